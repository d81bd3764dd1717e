"""Fit the constants of the time model to published step times, and print them.

python -m tools.bench.fit_plan TABLE.yaml
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path

from launch.cli import refusing
from megatron_ext.plan.constants import PRIOR, Constants
from megatron_ext.plan.hardware import hardware, network
from megatron_ext.plan.machine import Machine
from megatron_ext.plan.published import Row
from megatron_ext.plan.step_time import step_time
from megatron_ext.plan.tables import read

SHARES = {field.name for field in fields(Constants) if 0.2 < field.default < 0.9}
FITTED = (
    "vtrain_multi",
    "korthikanti_table3_5",
    "skywork_table10",
    "dgxc_h100_gb200",
    "mcore_h100_weak",
)
"""Tables whose rows are fitted; the others are only predicted."""

WIDTHS = {
    "memory": 0.2,
    "nvlink": 0.3,
    "flash_attention": 0.3,
    "ring_attention": 0.3,
    "fp8_cast_bytes": 0.3,
    "kernel_gap": 0.3,
    "step_overhead": 0.3,
}
"""Standard deviation of the prior on the logarithm (or logit) of constants measured elsewhere."""

WIDTH = 0.7
"""The same for all others."""

TABLE_WEIGHTS = {"mcore_h100_weak": 1.0, "skywork_table10": 6.0}
"""Below 3 where the micro-batch is not published; above for the cluster that recipes name."""

NOISE = 0.03
"""Scatter of a published step time that no model explains (NeMo's two versions of one table)."""


def machine(row: Row, constants: Constants) -> Machine:
    """What the row was measured on."""
    return Machine(
        hardware=hardware(row.hardware),
        network=network(row.network),
        gpus_per_node=8,
        constants=constants,
    )


def ratio(row: Row, constants: Constants) -> float:
    """Predicted over published seconds."""
    return step_time(machine(row, constants), row.shape, row.layout).total / (row.seconds or 1.0)


def _forth(name: str, value: float) -> float:
    return math.log(value / (1 - value)) if name in SHARES else math.log(value)


def _back(name: str, value: float) -> float:
    return 1 / (1 + math.exp(-value)) if name in SHARES else math.exp(value)


def _constants(names: list[str], point: Iterable[float]) -> Constants:
    return replace(
        PRIOR, **{name: _back(name, value) for name, value in zip(names, point, strict=True)}
    )


def fit(rows: list[Row], *, weight: Callable[[Row], float], rounds: int = 30) -> Constants:
    """Constants of least absolute logarithmic error, held by a wide prior on each.

    Gauss-Newton on reweighted squares, with slopes by differences.
    """
    import numpy as np

    names = [field.name for field in fields(Constants)]
    prior = np.array([_forth(name, getattr(PRIOR, name)) for name in names])
    width = np.array([WIDTHS.get(name, WIDTH) for name in names])
    weights = np.array([weight(row) for row in rows])

    def residuals(point: "np.ndarray") -> "np.ndarray":
        constants = _constants(names, point)
        return np.array([math.log(ratio(row, constants)) for row in rows])

    def loss(errors: "np.ndarray", point: "np.ndarray") -> float:
        size = np.log1p((errors / NOISE) ** 2)
        return float((weights * size).sum() + 0.5 * (((point - prior) / width) ** 2).sum())

    point, damping = prior.copy(), 1e-2
    errors = residuals(point)
    best = loss(errors, point)
    for _ in range(rounds):
        step = 1e-3
        slopes = np.stack(
            [(residuals(point + step * unit) - errors) / step for unit in np.eye(len(names))], 1
        )
        inverse = 2 * weights / (NOISE**2 + errors**2)
        normal = slopes.T @ (inverse[:, None] * slopes) + np.diag(1 / width**2)
        pull = slopes.T @ (inverse * errors) + (point - prior) / width**2
        for _ in range(6):
            moved = point - np.linalg.solve(normal + damping * np.diag(np.diag(normal)), pull)
            trial = residuals(moved)
            if loss(trial, moved) < best:
                point, errors, best, damping = moved, trial, loss(trial, moved), damping / 4
                break
            damping *= 4
        else:
            break
    return _constants(names, point)


def even(rows: list[Row]) -> Callable[[Row], float]:
    """Weights under which each table counts by the root of its rows, not by their number."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.table] = counts.get(row.table, 0) + 1
    return lambda row: TABLE_WEIGHTS.get(row.table, 3.0) * counts[row.table] ** -0.75


def fitted_rows(rows: list[Row]) -> list[Row]:
    """The step times among ``rows`` that the constants may see."""
    return [row for row in rows if row.seconds and row.table in FITTED]


def main() -> None:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("table", type=Path)
    rows = fitted_rows(read(parser.parse_args().table))
    fitted = fit(rows, weight=even(rows))
    for field in fields(Constants):
        print(f"{field.name} = {getattr(fitted, field.name):.4g}  (prior {field.default:.4g})")


if __name__ == "__main__":
    sys.exit(refusing(main))

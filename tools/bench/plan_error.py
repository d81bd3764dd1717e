"""Hold the planner to published tables: errors of step time and memory.

python -m tools.bench.plan_error TABLE.yaml ...              # frozen constants
python -m tools.bench.plan_error TABLE.yaml --leave-one-out  # refitted without each model
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from launch.cli import refusing
from megatron_ext.plan.constants import FROZEN, Constants
from megatron_ext.plan.hardware import hardware
from megatron_ext.plan.machine import Machine
from megatron_ext.plan.memory import GIB, stage_memory
from megatron_ext.plan.published import Row
from megatron_ext.plan.step_time import step_time
from megatron_ext.plan.tables import read, unread
from tools.bench.fit_plan import even, fit, fitted_rows, machine

LARGE = 5 * GIB
"""Peaks below this are of toy models, which workspaces dominate."""


def seconds_error(row: Row, constants: Constants) -> float:
    """Relative error of the predicted step time."""
    on: Machine = machine(row, constants)
    return step_time(on, row.shape, row.layout).total / (row.seconds or 1.0) - 1


def memory_error(row: Row, measured: float | None, of: str) -> float:
    """Relative error of the stage that the table logs: CI the last one, others the fullest."""
    stages = stage_memory(row.shape, row.layout)
    last = row.table == "mcore_ci_golden"
    stage = stages[-1] if last else max(stages, key=lambda one: one.peak)
    return float(getattr(stage, of)) / (measured or 1.0) - 1


def line(name: str, errors: Iterable[float]) -> str:
    """Mean, median and worst absolute error, and the bias, in percent."""
    signed = [100 * error for error in errors]
    sizes = [abs(error) for error in signed]
    return (
        f"{name:<44} {len(sizes):>4} {statistics.mean(sizes):>7.2f} "
        f"{statistics.median(sizes):>7.2f} {max(sizes):>7.2f} {statistics.mean(signed):>+7.2f}"
    )


def grouped(rows: list[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """``rows`` by ``key``, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def precision_of(row: Row) -> str:
    """Table and precision, as one heading."""
    return f"{row.table} {'fp8' if row.layout.fp8 else row.layout.dtype}"


def report_time(rows: list[Row], verbose: bool) -> None:
    """Errors of step time under the frozen constants."""
    timed = [row for row in rows if row.seconds]
    for name, members in grouped(timed, precision_of).items():
        errors = [seconds_error(row, FROZEN) for row in members]
        print(line(name, errors))
        for row, error in zip(members, errors, strict=True) if verbose else ():
            print(f"    {row.name:<50} {row.seconds:>9.3f} s {100 * error:>+7.2f} %")


def report_memory(rows: list[Row], verbose: bool) -> None:
    """Errors of allocated and peak bytes, large models apart from toys."""
    measured = [row for row in rows if row.peak_bytes]

    def heading(row: Row) -> str:
        return f"{row.table} {'above' if (row.peak_bytes or 0) > LARGE else 'below'} 5 GiB"

    for name, members in grouped(measured, heading).items():
        static = [row for row in members if row.allocated_bytes]
        if static:
            errors = [memory_error(row, row.allocated_bytes, "static") for row in static]
            print(line(f"{name}, allocated", errors))
        errors = [memory_error(row, row.peak_bytes, "peak") for row in members]
        print(line(f"{name}, peak", errors))
        for row, error in zip(members, errors, strict=True) if verbose else ():
            print(f"    {row.name:<50} {(row.peak_bytes or 0) / GIB:>8.2f} GiB {error:>+7.2%}")


def planned_seconds(row: Row) -> float:
    """The step time that the frozen constants give."""
    return step_time(machine(row, FROZEN), row.shape, row.layout).total


def report_decisions(rows: list[Row]) -> None:
    """Whether the best published layout comes first, and out-of-memory rows are flagged."""
    for row in rows:
        if row.out_of_memory:
            need = max(stage.total for stage in stage_memory(row.shape, row.layout)) / GIB
            have = hardware(row.hardware).memory_bytes / GIB
            verdict = "flagged" if need > have else "MISSED"
            print(f"out of memory: {row.name}: {need:.1f} of {have:.1f} GiB, {verdict}")
    sweeps = [row for row in rows if row.table == "skywork_table10" and row.seconds]
    for members in grouped(sweeps, lambda row: row.group).values():
        best = min(members, key=lambda row: row.seconds or 0.0)
        ours = min(members, key=planned_seconds)
        print(f"best layout: published {best.name}, planned {ours.name}")


def report_left_out(rows: list[Row]) -> None:
    """Errors on each model of a table when the fit has not seen it."""
    usable = fitted_rows(rows)
    for members in grouped(usable, lambda row: row.table).values():
        errors: dict[str, list[float]] = {}
        for group, left in grouped(members, lambda row: row.group).items():
            others = [row for row in usable if row not in left]
            if not others or len(members) < 3:
                continue
            constants = fit(others, weight=even(others))
            for row in left:
                error = seconds_error(row, constants)
                errors.setdefault(precision_of(row), []).append(error)
                errors.setdefault(f"  without {group}, {precision_of(row)}", []).append(error)
        for name in sorted(errors, key=lambda name: (name.startswith("  "), name)):
            print(line(name, errors[name]))


def main() -> None:
    """Print every error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tables", type=Path, nargs="+", metavar="TABLE.yaml")
    parser.add_argument("--leave-one-out", action="store_true", help="refit without each model")
    parser.add_argument("--verbose", action="store_true", help="every row")
    chosen = parser.parse_args()
    rows = [row for path in chosen.tables for row in read(path)]
    head = f"{'':<44} {'rows':>4} {'mean %':>7} {'median':>7} {'worst':>7} {'bias':>7}"
    print(f"step time, constants frozen\n{head}")
    report_time(rows, chosen.verbose)
    print(f"\nmemory\n{head}")
    report_memory(rows, chosen.verbose)
    report_decisions(rows)
    if chosen.leave_one_out:
        print(f"\nstep time, fitted without the model or size\n{head}")
        report_left_out(rows)
    skipped = [name for path in chosen.tables for name in unread(path)]
    print(f"\nnot predicted: {', '.join(skipped)}")


if __name__ == "__main__":
    sys.exit(refusing(main))

"""Whether every layout trains as one rank does: your config, shrunk, on a grid of CPU ranks.

    python -m tools.selftest recipe=index_1p9b/pretrain
    python -m tools.selftest recipe=... --steps 5 --ranks 2

Each layout starts from the same weights and sees the same samples; losses and gradient norms are
printed beside those of one rank. In fp32, so that only the order of additions differs.
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cli import refusing

if TYPE_CHECKING:
    from launch.config import JobConfig
    from megatron_ext.config import RunConfig
    from megatron_ext.parallel.config import ParallelConfig

TOLERANCE = 2e-4
"""Relative: fp32 sums in another order, carried through the optimizer for a few steps."""

SEQUENCES = 8
"""Samples of each step."""


def grid(ranks: int) -> list[tuple[str, int, dict[str, Any]]]:
    """Layouts of at most ``ranks`` ranks: (name, ranks, parallel fields)."""
    tp = {"tensor_model_parallel_size": 2}
    pp = {"pipeline_model_parallel_size": 2}
    sp, zero = {"sequence_parallel": True}, {"use_distributed_optimizer": True}
    vpp = {"virtual_pipeline_model_parallel_size": 2}
    every = [
        ("tp2", 2, tp),
        ("tp2 sp", 2, tp | sp),
        ("pp2", 2, pp),
        ("pp2 vpp2", 2, pp | vpp),
        ("dp2", 2, {}),
        ("dp2 zero1", 2, zero),
        ("tp2 pp2 sp", 4, tp | pp | sp),
        ("tp2 dp2 zero1", 4, tp | zero),
        ("tp2 sp dp2 zero1", 4, tp | sp | zero),
        ("pp2 dp2 zero1", 4, pp | zero),
        ("tp2 pp2 sp dp2 zero1", 8, tp | pp | sp | zero),
    ]
    return [one for one in every if one[1] <= ranks]


def small(overrides: list[str]) -> "JobConfig":
    """The recipe at scale=tiny on random tokens, in fp32, with layers for two chunks a stage."""
    from launch.compose import compose

    job = compose([*overrides, "scale=tiny", "scale.ranks=1"])
    job.precision.dtype, job.precision.fp8 = "fp32", None
    job.data.synthetic, job.data.sources = True, {}
    job.model.num_layers = -(-job.model.num_layers // 4) * 4
    return job


def curve(run: "RunConfig", steps: int, out: Path) -> None:
    """Train ``steps`` on this rank's share; the last rank writes losses and gradient norms."""
    from megatron_ext.models.gpt import build_model
    from megatron_ext.optim.build import build_optimizer
    from megatron_ext.parallel import groups as parallel_groups
    from megatron_ext.testing import env, meeting
    from megatron_ext.train.phases import Plan
    from megatron_ext.train.sources import SyntheticBatches
    from megatron_ext.train.step import connect, train_step

    here = env()
    groups = parallel_groups.start(run.parallel, here, seed=run.seed, init_method=meeting())
    chunks = build_model(run, groups)
    optimizer = build_optimizer(run, chunks, groups)
    connect(chunks, optimizer)
    samples = SyntheticBatches(run, Plan.of(run).phases[0])
    seen = []
    for step in range(steps):
        first = step * SEQUENCES
        mine = range(first + groups.dp.rank(), first + SEQUENCES, groups.dp.size())

        def batches(mine: range = mine) -> Any:
            return (samples.micro_batch([k]) for k in mine)

        result = train_step(
            chunks,
            optimizer,
            batches,
            num_microbatches=len(mine),
            micro_batch_size=1,
            seq_length=samples.seq_length,
            groups=groups,
        )
        seen.append((result.loss, result.grad_norm))
    if here.rank == here.world_size - 1:
        out.write_text(json.dumps(seen))


def trained(
    run: "RunConfig", fields: dict[str, Any], ranks: int, steps: int
) -> list[list[float]] | str:
    """The curve of a layout, or the sentence with which it is refused."""
    from megatron_ext.testing import RankFailure, run_on_ranks

    parallel: ParallelConfig = replace(_plain(run.parallel), **fields)
    laid = replace(run, parallel=parallel)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "curve"
        try:
            parallel.check()
            laid.model.check(parallel)
            run_on_ranks(curve, laid, steps, out, world_size=ranks, timeout=300.0)
        except ValueError as refusal:
            return str(refusal)
        except RankFailure as failure:
            return str(failure).strip().splitlines()[-1]
        return list(json.loads(out.read_text()))


def _plain(parallel: "ParallelConfig") -> "ParallelConfig":
    """One rank, with what the recipe says of recomputation."""
    from megatron_ext.parallel.config import ParallelConfig

    return ParallelConfig(
        recompute_granularity=parallel.recompute_granularity,
        recompute_num_layers=parallel.recompute_num_layers,
        recompute_modules=parallel.recompute_modules,
    )


def worst(one: list[list[float]], other: list[list[float]]) -> float:
    """Largest relative difference of a loss or a gradient norm."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    if any(not math.isfinite(a) or not math.isfinite(b) for a, b in pairs):
        return math.inf
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs)


def main() -> int:
    """Train every layout and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="+", help="recipe=... dotted.key=value")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=4, help="most ranks of a layout")
    chosen = parser.parse_intermixed_args()
    run = small(chosen.overrides)
    alone = trained(run, {}, 1, chosen.steps)
    if isinstance(alone, str):
        raise ValueError(f"one rank cannot train this: {alone}")
    shape = f"{run.model.num_layers} layers of {run.model.hidden_size}"
    print(f"{run.name}, {shape}; tolerance {TOLERANCE:g} relative, {chosen.steps} steps, fp32")
    head = "  ".join(f"{f'loss, norm {step + 1}':>17}" for step in range(chosen.steps))
    print(f"{'layout':<22} {head}  verdict")
    print(f"{'one rank':<22} {_cells(alone)}  reference")
    different = 0
    for name, ranks, fields in grid(chosen.ranks):
        seen = trained(run, fields, ranks, chosen.steps)
        if isinstance(seen, str):
            print(f"{name:<22} not run: {seen}")
            continue
        off = worst(alone, seen)
        different += off > TOLERANCE
        verdict = "same" if off <= TOLERANCE else "DIFFERENT"
        print(f"{name:<22} {_cells(seen)}  {verdict}, {off:.1e}", flush=True)
    return 1 if different else 0


def _cells(curve: list[list[float]]) -> str:
    return "  ".join(f"{loss:>8.5f} {norm:>8.5f}" for loss, norm in curve)


if __name__ == "__main__":
    sys.exit(refusing(main))

"""Everything that would stop a run after the queue, found before it.

    python -m launch.preflight recipe=skywork_13b/stage1 cluster=a800_512
    python -m launch.preflight recipe=... cluster=mine --steps 1     also one small real step on CPU
    python -m launch.preflight recipe=... cluster=mine --no-data     the data is not on this machine

Shapes, ramps and phases; corpora, their hashes and tokens; tokenizer; disk; the checkpoint to go on
from; memory and time; then the real model, gradient buckets and optimizer at the real world size.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli import refusing
from launch.continuation import check_checkpoint
from launch.site import site, world_size
from launch.small_run import small_run

if TYPE_CHECKING:
    from launch.config import JobConfig

OFF = "-"
"""Result of a check that has nothing to look at."""

WARNING = "!"
"""Result of a check that found what is likely a mistake, and may be meant."""


@dataclass(frozen=True)
class Finding:
    """One check: its name, and what it saw or why it refuses."""

    name: str
    words: str
    refused: bool = False


def check_shapes(job: "JobConfig") -> str:
    """Model, layout, batches, lengths, mixtures and schedules of every phase."""
    from megatron_ext.check import check_run

    plan = check_run(job, world_size=world_size(job))
    return (
        f"{len(plan.phases)} phases, {plan.steps:,} steps, {plan.tokens / 1e9:,.1f} B tokens on "
        f"{world_size(job)} ranks"
    )


def check_positions(job: "JobConfig") -> str:
    """The RoPE base of every phase carries its sequences: else a warning, for it may be meant."""
    from megatron_ext.plan import rope_reach
    from megatron_ext.train.phases import Plan

    if sentences := rope_reach.warnings(job):
        return f"{WARNING} {' '.join(sentences)}"
    longest = max(phase.seq_length for phase in Plan.of(job).phases)
    return f"RoPE carries {longest:,} tokens"


def check_placement(job: "JobConfig") -> str:
    """Tensor parallelism stays inside a node, and groups fill nodes evenly: else a warning."""
    from megatron_ext.parallel.overlap import topology_warnings

    tp, here = job.parallel.tensor_model_parallel_size, job.cluster.ranks_per_node()
    if tp > here:
        raise ValueError(
            f"parallel.tensor_model_parallel_size={tp} spans nodes of {here} ranks: use {here} or "
            f"less, and parallel.pipeline_model_parallel_size for the rest."
        )
    if sentences := topology_warnings(job, gpus_per_node=job.cluster.gpus_per_node):
        return f"{WARNING} {' '.join(sentences)}"
    return f"TP {tp} inside nodes of {here}"


def check_data(job: "JobConfig") -> str:
    """Corpora are there, unchanged, of this tokenizer, and large enough for the plan."""
    from megatron_ext.train.phases import Plan
    from megatron_ext.train.sources import open_sources, open_validation

    if job.data.synthetic:
        return f"{OFF} data.synthetic=true"
    plan: Plan = Plan.of(job)
    sources = open_sources(job, plan)
    held = sum(source.num_tokens for source in sources.values())
    validation = open_validation(job, plan)
    return (
        f"{len(sources)} corpora, {held:,} tokens, fingerprints as recorded; "
        f"{len(validation)} for validation"
    )


def check_tokenizer(job: "JobConfig") -> str:
    """Every id of the tokenizer has a row."""
    from megatron_ext.data.tokenizer import load_tokenizer

    if not job.data.tokenizer.path:
        return f"{OFF} data.tokenizer.path is not given"
    ids = load_tokenizer(job.data.tokenizer).vocab_size
    if ids > job.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={job.model.vocab_size} is less than the {ids} ids of "
            f"data.tokenizer.path={job.data.tokenizer.path}: set model.vocab_size={ids}."
        )
    return f"{ids} ids, {job.model.vocab_size} rows"


def check_disk(job: "JobConfig") -> str:
    """The run folder's disk holds the checkpoints that will be kept, and one in the making."""
    from megatron_ext.plan.parameters import count_parameters
    from megatron_ext.plan.verdict import STORED_BYTES

    one = STORED_BYTES * count_parameters(job.model).total
    copies = job.checkpoint.keep + len(job.phases) + 1
    folder = Path(job.folder()).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if copies * one > free:
        keep = int(free / one) - len(job.phases) - 1
        less = f", or checkpoint.keep={keep}" if keep > 0 else ""
        raise ValueError(
            f"run_dir={job.folder()} has {free / 1e9:,.0f} GB free and needs "
            f"{copies * one / 1e9:,.0f} for {copies} checkpoints of {one / 1e9:,.1f} GB "
            f"(checkpoint.keep={job.checkpoint.keep}, {len(job.phases)} phase ends, one being "
            f"written): choose another run_dir{less}."
        )
    return f"{copies} checkpoints of {one / 1e9:,.1f} GB, {free / 1e9:,.0f} GB free"


def check_parent(job: "JobConfig") -> str:
    """A stage that continues another one says which checkpoint."""
    from megatron_ext import given

    given.check_parent(job)
    return job.checkpoint.load or f"{OFF} the recipe continues nothing"


def check_memory(job: "JobConfig") -> str:
    """Every stage fits its GPU, and how long the run takes."""
    from megatron_ext.plan.memory import GIB
    from megatron_ext.plan.verdict import judge_run, whole

    if job.cluster.hardware == "cpu" and not job.cluster.gpus_per_node:
        return f"{OFF} cluster.gpus_per_node=0: this cluster file names no accelerators"
    where = site(job)
    verdict = judge_run(job, where)
    if not verdict.fits:
        raise ValueError(
            f"{verdict.shortfall()}: see python -m tools.plan search with the same words, or "
            f"set parallel.recompute_granularity."
        )
    run = whole(job, verdict, where)
    return (
        f"{verdict.fullest.total / GIB:.1f} of {verdict.capacity / GIB:.1f} GiB; "
        f"{verdict.time.total:.2f} s a step, {verdict.tokens_per_second:.0f} tokens/s/GPU, "
        f"{run.wall_seconds / 86400:.1f} days, {run.gpu_hours(where.gpus):,.0f} GPU-hours"
    )


def check_dry_run(job: "JobConfig") -> str:
    """The code that trains builds every distinct rank, with the planned bytes."""
    from megatron_ext.plan.dry_run import built_parameters, dry_run

    built = dry_run(job, world_size(job))
    for one in built:
        if not one.agrees:
            raise ValueError(
                f"rank {one.rank} (stage {one.stage}, TP position {one.tp_rank}) is not as "
                f"planned: counted over planned, less one: {one.off()}."
            )
    ranks = ", ".join(str(one.rank) for one in built)
    worst = max(abs(off) for one in built for off in one.off().values())
    total = built_parameters(job, world_size(job), built)
    return (
        f"ranks {ranks} of {world_size(job)} built; {total:,} parameters; bytes as planned to "
        f"{worst:.2%}"
    )


def check_all(job: "JobConfig", *, data: bool = True, real: bool = True) -> Iterator[Finding]:
    """Every check in turn; a refusal does not stop the next, but nothing is built without shapes.

    ``data=False`` leaves out what is not on this machine, ``real=False`` the dry run.
    """
    checks: list[tuple[str, Callable[[JobConfig], str]]] = [("shapes", check_shapes)]
    checks += [("positions", check_positions), ("placement", check_placement)]
    if data:
        checks += [("data", check_data), ("tokenizer", check_tokenizer), ("disk", check_disk)]
    checks += [("parent", check_parent), ("checkpoint", check_checkpoint)]
    checks += [("memory and time", check_memory)]
    if real:
        checks += [("dry run", check_dry_run)]
    sound = True
    for name, check in checks:
        if name in ("positions", "memory and time", "dry run") and not sound:
            continue
        finding = _tried(name, lambda check=check: check(job))  # type: ignore[misc]
        sound = sound and not (name == "shapes" and finding.refused)
        yield finding


def _tried(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, check())
    except (ValueError, OSError) as refusal:
        return Finding(name, str(refusal), refused=True)


def main() -> int:
    """Check, print a line each, and say whether the run may be queued."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="+", help="recipe=... cluster=... dotted.key=value")
    parser.add_argument("--steps", type=int, default=0, help="also this many small real steps")
    parser.add_argument("--no-data", action="store_true", help="skip data, tokenizer and disk")
    parser.add_argument("--no-dry-run", action="store_true", help="skip building the real model")
    chosen = parser.parse_intermixed_args()
    from launch.compose import compose

    job = compose(chosen.overrides)
    job.cluster.check()
    job.slurm.check()
    refusals = 0
    for finding in check_all(job, data=not chosen.no_data, real=not chosen.no_dry_run):
        refusals += say(finding)
    if chosen.steps and not refusals:
        finding = _tried("small run", lambda: small_run(chosen.overrides, chosen.steps))
        refusals += say(finding)
    print("may be queued" if not refusals else f"{refusals} refused")
    return 2 if refusals else 0


def say(finding: Finding) -> int:
    """Print a line; 1 when it is a refusal."""
    marks = {OFF: "skipped", WARNING: "warning"}
    mark = "REFUSED" if finding.refused else marks.get(finding.words[0], "ok")
    words = finding.words if mark in ("REFUSED", "ok") else finding.words[1:].strip()
    print(f"{mark:<8} {finding.name:<16} {words}", flush=True)
    return int(finding.refused)


if __name__ == "__main__":
    sys.exit(refusing(main))

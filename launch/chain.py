"""Queue several jobs, each after the ones it needs: python -m launch.chain CHAIN.yaml [--dry-run]

    cluster: plain
    steps:
      - {name: prepare, tool: tools.prepare, args: [IN, OUT], options: {cpus-per-task: 32}}
      - {name: train, train: [recipe=index_1p9b/pretrain, slurm.nodes=8]}
      - {name: convert, tool: tools.convert, args: [megatron-to-hf, ...], after: [train]}

A step without ``after`` follows the one above it. When a step fails, Slurm cancels what needs it.
"""

import argparse
import json
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from launch.cli import refusing
from launch.sbatch import CHECKOUT, options, sbatch_command

if TYPE_CHECKING:
    from launch.config import JobConfig

TASK = CHECKOUT / "slurm" / "task.sbatch"
TOOL = re.compile(r"tools(\.[a-z_]+)+")
KEYS = {"name", "tool", "args", "options", "train", "after"}


@dataclass(kw_only=True)
class Step:
    """One job of a chain: a program of tools/, or a training run."""

    name: str
    tool: str = ""
    args: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    train: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)


def read(path: Path) -> tuple[str, list[Step]]:
    """Cluster and steps of a chain file, in an order in which they can be queued.

    Raises:
        ValueError: a step that can never start, or that is neither a tool nor a run.
    """
    tree = yaml.safe_load(path.read_text())
    if not isinstance(tree, dict) or not isinstance(tree.get("steps"), list) or not tree["steps"]:
        raise ValueError(f"{path} has no list of steps.")
    steps: list[Step] = []
    for entry in tree["steps"]:
        if not isinstance(entry, dict) or (unknown := set(entry) - KEYS):
            raise ValueError(f"{path}: a step knows {sorted(KEYS)}, not {unknown or entry!r}.")
        step = Step(
            name=str(entry.get("name", "")),
            tool=str(entry.get("tool", "")),
            args=[str(a) for a in entry.get("args", [])],
            options={str(k): str(v) for k, v in entry.get("options", {}).items()},
            train=[str(o) for o in entry.get("train", [])],
            after=[str(a) for a in entry.get("after", [s.name for s in steps[-1:]])],
        )
        check(step, known=[s.name for s in steps])
        steps.append(step)
    return str(tree.get("cluster", "local")), steps


def check(step: Step, *, known: list[str]) -> None:
    """Refuse a step that could never run.

    Raises:
        ValueError: naming the step.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", step.name) or step.name in known:
        raise ValueError(f"steps: name={step.name!r} is empty, taken or not a plain word.")
    if bool(step.tool) == bool(step.train):
        raise ValueError(f"steps.{step.name}: give either tool or train.")
    if step.tool and not TOOL.fullmatch(step.tool):
        raise ValueError(f"steps.{step.name}.tool={step.tool!r} is not a program of tools/.")
    for other in step.after:
        if other not in known:
            raise ValueError(
                f"steps.{step.name}.after={other} is no step above it, so that {step.name} could "
                f"never start: known there are {', '.join(known) or 'none'}."
            )


def command(step: Step, cluster: str, ids: dict[str, str], job: "JobConfig") -> list[str]:
    """The sbatch words of ``step`` once the jobs before it have ids."""
    needs = ":".join(ids[name] for name in step.after)
    job.slurm.dependency = f"afterok:{needs}" if needs else ""
    job.slurm.check()
    if step.train:
        return sbatch_command(job, Path(job.folder()).absolute())
    job.name = step.name
    job.slurm.nodes = 1
    job.cluster.options.update(step.options)
    job.cluster.check()
    logs = Path("runs/tasks").absolute()
    words = [w for w in options(job, logs) if not w.startswith(("--gpus", "--ntasks", "--signal"))]
    return ["sbatch", "--parsable", *words, str(TASK), step.tool, *step.args]


def queue_all(cluster: str, steps: list[Step], *, dry_run: bool) -> dict[str, str]:
    """Queue every step; returns the job ids by name. On a refusal, cancels what was queued."""
    from launch import scheduler
    from launch.submit import prepare, queue, record

    ids: dict[str, str] = {}
    folders: dict[str, Path] = {}
    try:
        for step in steps:
            job = prepare([*step.train, f"cluster={cluster}"]) if step.train else bare(cluster)
            words = command(step, cluster, ids, job)
            if dry_run:
                print(shlex.join(words))
                ids[step.name] = str(len(ids) + 1)
                continue
            if step.train:
                folders[step.name] = Path(job.folder()).absolute()
                record(job, folders[step.name], words)
            else:
                Path("runs/tasks/logs").mkdir(parents=True, exist_ok=True)
            ids[step.name] = queue(words)
            if step.train:
                (folders[step.name] / "job").write_text(f"{ids[step.name]}\n")
    except ValueError:
        for job_id in ids.values() if not dry_run else ():
            scheduler.cancel(job_id)
        raise
    for name, folder in folders.items():
        behind = {ids[s.name]: s.name for s in steps if name in s.after}
        (folder / "successors.json").write_text(json.dumps(behind) + "\n")
    return ids


def bare(cluster: str) -> "JobConfig":
    """A job of nothing but its cluster, for a tool."""
    from launch.compose import compose

    return compose([f"cluster={cluster}", "model=llama_tiny", "phases=[{tokens:1}]", "name=task"])


def main() -> int:
    """Read, queue, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chain", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    args = parser.parse_args()
    cluster, steps = read(args.chain)
    ids = queue_all(cluster, steps, dry_run=args.dry_run)
    if not args.dry_run:
        for name, job_id in ids.items():
            print(f"job {job_id}: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(refusing(main))

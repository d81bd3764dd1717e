"""Queue several jobs, each after the ones it needs: python -m launch.chain CHAIN.yaml [--dry-run]

    cluster: plain
    steps:
      - {name: prepare, tool: tools.prepare, args: [IN, OUT], options: {cpus-per-task: 32}}
      - {name: train, train: [recipe=index_1p9b/pretrain, slurm.nodes=8]}
      - {name: convert, tool: tools.convert, args: [megatron-to-hf, RUN_DIR, HF], after: [train]}
      - {name: evaluate, tool: tools.evaluate, args: [RUN_DIR, --data, PREFIX], after: [train]}

A step without ``after`` follows the one above it. When a step fails, Slurm cancels what needs it.
"""

import argparse
import json
import re
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launch.cli import refusing
from launch.sbatch import CHECKOUT, options, sbatch_command, setup
from launch.step_words import task_words
from megatron_ext.atomic import write_text
from megatron_ext.legal import unknown_choice

if TYPE_CHECKING:
    from launch.config import JobConfig

TASK = CHECKOUT / "slurm" / "task.sbatch"
TOOL = re.compile(r"tools(\.[a-z][a-z_]*)+")
FIELDS = {"cpus-per-task": "cpus_per_task", "mem": "memory"} | {
    name: name for name in ("time", "partition", "account", "qos", "constraint")
}
"""Options of a step that have a field of the cluster's."""
NOT_OF_TOOLS = ("--gpus", "--ntasks", "--signal")
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
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("steps"), list) or not tree["steps"]:
        raise ValueError(f"{path} has no list of steps.")
    steps: list[Step] = []
    for entry in tree["steps"]:
        if not isinstance(entry, dict) or (unknown := set(entry) - KEYS):
            raise ValueError(f"{path}: a step knows {sorted(KEYS)}, not {unknown or entry!r}.")
        step = Step(
            name=str(entry.get("name", "")),
            tool=str(entry.get("tool", "")),
            args=_words(entry, "args", []),
            options={str(k): str(v) for k, v in _given(entry, "options", {}).items()},
            train=_words(entry, "train", []),
            after=_words(entry, "after", [s.name for s in steps[-1:]]),
        )
        check(step, known=[s.name for s in steps])
        steps.append(step)
    return str(tree.get("cluster", "local")), steps


def _given(entry: dict[str, Any], key: str, otherwise: Any) -> Any:
    """``entry[key]``, refused where it is not of the same kind as ``otherwise``."""
    value = entry.get(key, otherwise)
    if not isinstance(value, type(otherwise)):
        kind = "list, [a, b]" if isinstance(otherwise, list) else "mapping, {name: value}"
        raise ValueError(f"steps.{entry.get('name', '')}.{key}={value!r} is no {kind}.")
    return value


def _words(entry: dict[str, Any], key: str, otherwise: list[str]) -> list[str]:
    return [str(word) for word in _given(entry, key, otherwise)]


def programs() -> list[str]:
    """Every program of tools/ that a step can name."""
    paths = sorted((CHECKOUT / "tools").rglob("[a-z]*.py"))
    found = [path for path in paths if '__name__ == "__main__"' in path.read_text()]
    return [".".join(path.relative_to(CHECKOUT).with_suffix("").parts) for path in found]


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
    if step.tool and step.tool not in (known_tools := programs()):
        raise unknown_choice(f"steps.{step.name}.tool", step.tool, known_tools)
    for other in step.after:
        if other not in known:
            raise ValueError(
                f"steps.{step.name}.after={other} is no step above it, so that {step.name} could "
                f"never start: known there are {', '.join(known) or 'none'}."
            )


def command(step: Step, ids: dict[str, str], job: "JobConfig", folder: Path) -> list[str]:
    """The sbatch words of ``step`` once the jobs before it have ids.

    ``folder``: of the run, or of what a tool's batch shell reads.
    """
    needs = ":".join(ids[name] for name in step.after)
    job.slurm.check()
    job.slurm.dependency = f"afterok:{needs}" if needs else job.slurm.dependency
    if step.train:
        return sbatch_command(job, folder)
    job.name = step.name
    job.slurm.nodes = 1
    for name, value in step.options.items():
        if name not in FIELDS:
            job.cluster.options[name] = value
        elif name == "cpus-per-task" and not value.isdigit():
            raise ValueError(f"steps.{step.name}.options.{name}={value} is no number of cores.")
        else:
            setattr(job.cluster, FIELDS[name], int(value) if name == "cpus-per-task" else value)
    job.cluster.check()
    words = [w for w in options(job, folder.parent) if not w.startswith(NOT_OF_TOOLS)]
    return ["sbatch", "--parsable", *words, str(TASK), str(folder), step.tool, *step.args]


def queue_all(
    cluster: str, steps: list[Step], *, dry_run: bool, checked: bool = True
) -> dict[str, str]:
    """Queue every step; returns the job ids by name. On a refusal, cancels what was queued.

    ``checked`` runs the preflight of runs that need no step before them, on GPU clusters.
    """
    from launch import scheduler
    from launch.submit import note_queued, preflight, prepare, queue, queue_recorded
    from launch.truth import refuse_live

    stamp = time.strftime("%Y%m%d-%H%M%S")
    jobs: list[tuple[Step, JobConfig, Path]] = []
    for step in steps:
        job = prepare([*step.train, f"cluster={cluster}"]) if step.train else bare(cluster)
        folder = Path(job.folder()) if step.train else Path("runs/tasks") / f"{step.name}-{stamp}"
        if step.train:
            refuse_live(folder.absolute())
            if checked and not dry_run and not step.after and job.cluster.gpus_per_node:
                preflight(job)
        jobs.append((step, job, folder.absolute()))
    ids: dict[str, str] = {}
    try:
        for step, job, folder in jobs:
            words = command(step, ids, job, folder)
            if dry_run:
                print(shlex.join(words))
                ids[step.name] = step.name
            elif step.train:
                ids[step.name] = queue_recorded([(job, folder)], words)
                note_queued(folder, ids[step.name])
            else:
                record_task(job, folder)
                ids[step.name] = queue(words)
    except (ValueError, OSError):
        for job_id in ids.values() if not dry_run else ():
            scheduler.cancel(job_id)
        raise
    for step, _, folder in jobs:
        if step.train and not dry_run:
            behind = {ids[s.name]: s.name for s in steps if step.name in s.after}
            write_text(folder / "successors.json", json.dumps(behind) + "\n")
    return ids


def record_task(job: "JobConfig", folder: Path) -> None:
    """Leave what slurm/task.sbatch reads: the set-up of the site, and how Python is started."""
    (folder.parent / "logs").mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    write_text(folder / "setup.sh", setup(job))
    write_text(folder / "step", "\n".join(task_words(job)) + "\n")


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
    parser.add_argument("--no-preflight", action="store_true", help="queue what it would refuse")
    args = parser.parse_args()
    cluster, steps = read(args.chain)
    ids = queue_all(cluster, steps, dry_run=args.dry_run, checked=not args.no_preflight)
    if not args.dry_run:
        for name, job_id in ids.items():
            print(f"job {job_id}: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(refusing(main))

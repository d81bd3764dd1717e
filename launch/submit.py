"""Queue a run on Slurm: compose, check, write it down, submit.

python -m launch.submit recipe=index_1p9b/pretrain cluster=mine slurm.nodes=8
python -m launch.submit --dry-run ...       print the command, write and queue nothing
python -m launch.submit --test-only ...     ask Slurm whether and when it could start
python -m launch.submit --multirun recipe=... model.norm_head=true,false   one array
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli import refusing
from launch.sbatch import CHECKOUT, sbatch_command, setup
from launch.site import asked_nodes, world_size
from launch.truth import refuse_live
from megatron_ext.atomic import write_text
from megatron_ext.resilience.stop import stop_file

if TYPE_CHECKING:
    from launch.config import JobConfig

WITHOUT = "Without Slurm the same run goes on here by python -m launch.train --config {}"


def prepare(overrides: list[str]) -> "JobConfig":
    """The job, checked as far as this machine can.

    Raises:
        ValueError: what would fail after hours in the queue.
    """
    from launch.compose import compose
    from megatron_ext.check import check_run
    from megatron_ext.checkpoint.resumable import check_resumable
    from megatron_ext.devices.cuda import capability_of, refuse_precision

    job = compose(overrides)
    job.cluster.check()
    job.slurm.check()
    job.slurm.nodes = asked_nodes(job)
    check_run(job, world_size=world_size(job))
    check_resumable(job)
    hardware = job.cluster.hardware
    refuse_precision(
        job.precision.word(), capability_of(hardware), where=f"cluster.hardware={hardware}"
    )
    return job


def preflight(job: "JobConfig") -> None:
    """Everything that launch.preflight checks. Says what it sees.

    Raises:
        ValueError: the refusals, together.
    """
    from launch.preflight import check_all, say

    findings = list(check_all(job))
    for finding in findings:
        say(finding)
    if refused := [f"{one.name}: {one.words}" for one in findings if one.refused]:
        raise ValueError(f"preflight: {' | '.join(refused)} (--no-preflight queues it anyway)")


def record(job: "JobConfig", run_dir: Path, words: list[str]) -> None:
    """Leave config, set-up, code version and the exact command in the run folder."""
    from launch.attempt import private_folder
    from launch.compose import save

    private_folder(run_dir)
    (run_dir / "logs").mkdir(mode=0o700, exist_ok=True)
    save(job, run_dir / "config.yaml")
    write_text(run_dir / "setup.sh", setup(job))
    write_text(
        run_dir / "submit.sh",
        f"#!/bin/bash\ncd {shlex.quote(str(CHECKOUT))}\n{shlex.join(words)}\n",
    )
    write_text(run_dir / "code.json", json.dumps(code_version(), indent=1) + "\n")


def queue_recorded(runs: list[tuple["JobConfig", Path]], words: list[str]) -> str:
    """Record ``runs`` and queue the job that runs them; returns its id.

    Raises:
        ValueError: Slurm refused; folders of older runs hold the config.yaml of before.
    """
    configs = [run_dir / "config.yaml" for _, run_dir in runs]
    before = {path: path.read_text() for path in configs if path.exists()}
    for job, run_dir in runs:
        record(job, run_dir, words)
    try:
        return queue(words)
    except ValueError:
        for path, text in before.items():
            write_text(path, text)
        raise


def note_queued(run_dir: Path, job_id: str) -> None:
    """Write down that Slurm took the run as ``job_id``.

    An older request of launch.stop is taken back: what is queued now is to run.
    """
    stop_file(run_dir).unlink(missing_ok=True)
    write_text(run_dir / "job", f"{job_id}\n")


def code_version() -> dict[str, str]:
    """The commit that is checked out, and what differs from it."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(CHECKOUT), *words], capture_output=True, text=True, check=False
            )
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    return {"commit": git("rev-parse", "HEAD"), "changes": git("diff", "HEAD")[: 1 << 20]}


def queue(words: list[str]) -> str:
    """Run sbatch; returns the job id.

    Raises:
        ValueError: Slurm refused; its own words are passed on.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=CHECKOUT, check=False)
    except OSError as error:
        raise ValueError(f"sbatch: {error.strerror}. {WITHOUT.format(words[-1])}") from error
    job_id = done.stdout.strip().split(";")[0]
    if done.returncode or not job_id.isdigit():
        said = (done.stderr or done.stdout).strip().replace("sbatch: ", "").splitlines()
        lost = WITHOUT.format(words[-1]) if "configuration source" in done.stderr else ""
        raise ValueError(f"sbatch: {'; '.join(said)}. {lost}".strip())
    return job_id


def submit(job: "JobConfig", *, dry_run: bool, test_only: bool, checked: bool = True) -> None:
    """Queue one job, or say what would be. ``checked`` runs the preflight on GPU clusters."""
    run_dir = Path(job.folder()).absolute()
    words = sbatch_command(job, run_dir)
    refuse_live(run_dir)
    if dry_run:
        print(shlex.join(words))
        return
    if test_only:
        done = subprocess.run([words[0], "--test-only", *words[2:]], cwd=CHECKOUT, check=False)
        raise SystemExit(done.returncode)
    if checked and job.cluster.gpus_per_node:
        preflight(job)
    job_id = queue_recorded([(job, run_dir)], words)
    note_queued(run_dir, job_id)
    print(f"job {job_id} queued: {run_dir}")
    print(f"  python -m launch.status {run_dir} --watch")


def refuse_long_array(runs: int) -> None:
    """Refuse an array that the Slurm of this machine, where it has one, would refuse."""
    from launch.scheduler import longest_array

    most = longest_array()
    if most is not None and runs > most:
        raise ValueError(
            f"--multirun asks for {runs:,} runs in one array, and Slurm takes {most:,} here "
            f"(MaxArraySize in slurm.conf): submit them in {math.ceil(runs / most)} parts."
        )


def submit_array(
    overrides: list[str],
    *,
    dry_run: bool,
    test_only: bool,
    most: int | None = None,
    checked: bool = True,
) -> None:
    """One array for all combinations of comma-separated values, ``most`` at most.

    Raises:
        ValueError: the runs are too many or ask different things of the cluster, or one is live.
    """
    from launch.compose import MOST_RUNS, sweep

    runs = sweep(overrides, most=MOST_RUNS if most is None else most)
    refuse_long_array(len(runs))
    jobs = [prepare(one) for one in runs]
    base = Path(jobs[0].folder()).absolute()
    for k, job in enumerate(jobs):
        job.name, job.run_dir = f"{job.name}-{k}", f"{base}-{k}"
        refuse_live(Path(job.run_dir))
        if (job.cluster, job.slurm) != (jobs[0].cluster, jobs[0].slurm):
            raise ValueError(
                "cluster and slurm settings must be the same for all runs of one array: submit "
                "those that differ by themselves."
            )
    words = sbatch_command(jobs[0], Path(jobs[0].run_dir))
    limit = min(jobs[0].slurm.array_limit, len(jobs))
    listing = base.with_name(f"{base.name}.runs") / "list"
    words[2:2] = [f"--array=0-{len(jobs) - 1}%{limit}"]
    words[-1] = str(listing)
    words = [w.replace("slurm-%j.log", "slurm-%A_%a.log") for w in words]
    if dry_run:
        print(shlex.join(words))
        return
    if test_only:
        command = [words[0], "--test-only", *words[2:-1], str(CHECKOUT)]
        raise SystemExit(subprocess.run(command, cwd=CHECKOUT, check=False).returncode)
    for job in jobs:
        if checked and job.cluster.gpus_per_node:
            preflight(job)
    listing.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(listing.with_name("setup.sh"), setup(jobs[0]))
    write_text(listing, "".join(f"{job.run_dir}/config.yaml\n" for job in jobs))
    array = queue_recorded([(job, Path(job.run_dir)) for job in jobs], words)
    for k, job in enumerate(jobs):
        note_queued(Path(job.run_dir), f"{array}_{k}")
    print(f"array {array} queued: {len(jobs)} runs, {limit} at once: {base}-*")


def main() -> None:
    """Parse and submit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="+", help="GROUP=CHOICE or dotted.key=VALUE")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--test-only", action="store_true")
    parser.add_argument("--multirun", action="store_true")
    parser.add_argument("--most-runs", type=int, help="of a --multirun, where not as many as usual")
    parser.add_argument("--no-preflight", action="store_true", help="queue what it would refuse")
    args = parser.parse_intermixed_args()
    if args.multirun:
        submit_array(
            args.overrides,
            dry_run=args.dry_run,
            test_only=args.test_only,
            most=args.most_runs,
            checked=not args.no_preflight,
        )
    else:
        submit(
            prepare(args.overrides),
            dry_run=args.dry_run,
            test_only=args.test_only,
            checked=not args.no_preflight,
        )


if __name__ == "__main__":
    sys.exit(refusing(main))

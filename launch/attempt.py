"""Begin and end one attempt at a run, for slurm/train.sbatch.

python -m launch.attempt begin key=value ... | RUN_DIR/config.yaml   prints the attempt's folder
python -m launch.attempt end FOLDER EXIT_CODE [SIGNAL]               prints the action, and after
                                                                     "again" the next folder
"""

import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch import scheduler
from launch.after_attempt import close_silent, conclude, perform, spare_node
from launch.cli import refusing
from launch.step_words import step_words
from launch.truth import queued
from megatron_ext.atomic import write_text
from megatron_ext.checkpoint.resumable import check_resumable
from megatron_ext.resilience import attempts, lease
from megatron_ext.resilience.outcome import Outcome, clear_outcome, read_outcome, write_outcome
from megatron_ext.resilience.progress import newest_step
from megatron_ext.resilience.stop import stop_file

if TYPE_CHECKING:
    from launch.config import JobConfig

log = logging.getLogger(__name__)


def job_of(words: list[str], environ: Mapping[str, str]) -> "JobConfig":
    """The job that the batch file was given: a saved one, or overrides.

    A requeued job takes what it was first given, even where conf/ has changed since.
    """
    from launch.compose import compose, load

    if len(words) == 1 and words[0].endswith(".yaml"):
        job = load(Path(words[0]))
    elif len(words) == 1 and words[0].endswith(".runs/list"):
        listed = Path(words[0]).read_text().splitlines()
        job = load(Path(listed[int(environ["SLURM_ARRAY_TASK_ID"])]))
    else:
        job = compose(words)
        saved = Path(job.folder()) / "config.yaml"
        if int(environ.get("SLURM_RESTART_COUNT", "0")) and saved.exists():
            job = load(saved)
    given = int(environ["SLURM_JOB_NUM_NODES"])
    return replace(job, slurm=replace(job.slurm, nodes=job.slurm.nodes or given))


def check_allocation(job: "JobConfig", environ: Mapping[str, str]) -> None:
    """Refuse an allocation of another shape than the job was written for.

    Raises:
        ValueError: Slurm gave another number of nodes, as it silently does for ``-N9 -n1``.
    """
    given = int(environ["SLURM_JOB_NUM_NODES"])
    if given != job.slurm.nodes:
        raise ValueError(
            f"slurm.nodes={job.slurm.nodes}, and Slurm gave {given}: give sbatch "
            f"--nodes={job.slurm.nodes} and no --ntasks."
        )


def begin(words: list[str], environ: Mapping[str, str]) -> Path:
    """Make the run folder, take the lease, write down the attempt; returns its folder."""
    from launch.compose import save

    job = job_of(words, environ)
    run_dir = private_folder(Path(job.folder()))
    try:
        job.cluster.check()
        job.slurm.check()
        check_allocation(job, environ)
        check_resumable(job)
    except ValueError as refusal:
        past = attempts.history(run_dir)
        if read_outcome(run_dir) is None and (not past or past[-1].ended is not None):
            write_outcome(run_dir, Outcome(word="refused", cause=str(refusal)))
        raise
    save(job, run_dir / "config.yaml")
    (run_dir / "logs").mkdir(mode=0o700, exist_ok=True)
    return start_attempt(run_dir, job, environ, after=None)


def private_folder(path: Path) -> Path:
    """The run folder, readable by its owner only.

    Raises:
        ValueError: the path is a link, or others may write to it.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o022:
        raise ValueError(f"{path} is a link or writable by others: run folders are private.")
    return path


def start_attempt(
    run_dir: Path, job: "JobConfig", environ: Mapping[str, str], *, after: str | None
) -> Path:
    """Take the lease, write down that an attempt begins and how its ranks are started."""
    past = attempts.history(run_dir)
    name = lease.new_attempt()
    lease.take(run_dir, name, after=after)
    if past and past[-1].ended is None:
        close_silent(run_dir, past[-1])
    clear_outcome(run_dir)
    if begun_by_hand(run_dir, environ, after=after):
        stop_file(run_dir).unlink(missing_ok=True)
    if job_id := job_id_in(environ):
        write_text(run_dir / "job", f"{job_id}\n")
    folder = run_dir / "attempts" / name
    folder.mkdir(mode=0o700, parents=True)
    attempt = attempts.Attempt(
        number=past[-1].number + 1 if past else 0,
        attempt=name,
        job_id=job_id,
        restart_count=int(environ.get("SLURM_RESTART_COUNT", "0")),
        nodes=scheduler.hostnames(environ.get("SLURM_JOB_NODELIST", "")),
        started=time.time(),
        step_before=newest_step(run_dir),
    )
    attempts.append(run_dir, attempt)
    words = step_words(job, run_dir, attempt, environ, spare=spare_node(run_dir, job, attempt))
    write_text(folder / "step", "\n".join(words) + "\n")
    print(attempt.line(), file=sys.stderr, flush=True)
    return folder


def begun_by_hand(run_dir: Path, environ: Mapping[str, str], *, after: str | None) -> bool:
    """A person started this job with sbatch itself, which makes an older stop request void.

    launch.submit, launch.chain and launch.resume take it back before they queue. One that is there
    in a job of theirs, in a requeued job or between two attempts has come since, and is obeyed.
    """
    if after is not None or int(environ.get("SLURM_RESTART_COUNT", "0")):
        return False
    job_id = job_id_in(environ)
    return not job_id or queued(run_dir) != job_id


def job_id_in(environ: Mapping[str, str]) -> str:
    """The job that this process is in, one run of an array as ``ARRAY_TASK``; empty without one."""
    if array := environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "")


def end(folder: Path, exit_code: int, asked: str, environ: Mapping[str, str]) -> str:
    """Classify, decide, write down, act; returns the action. Starts the next one on ``again``."""
    from launch.compose import load

    run_dir = folder.parents[1]
    job = load(run_dir / "config.yaml")
    closed = conclude(run_dir, job, folder.name, exit_code=exit_code, asked=asked)
    print(closed.line(), file=sys.stderr, flush=True)
    action = perform(run_dir, job, closed)
    if action == "again":
        return f"again {start_attempt(run_dir, job, environ, after=closed.attempt)}"
    return action


def main() -> None:
    """The two verbs."""
    if len(sys.argv) < 3 or sys.argv[1] not in ("begin", "end"):
        print(__doc__)
        raise SystemExit(2 if sys.argv[1:2] not in (["--help"], ["-h"]) else 0)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    if sys.argv[1] == "begin":
        print(begin(sys.argv[2:], os.environ))
    else:
        asked = sys.argv[4] if len(sys.argv) > 4 else ""
        print(end(Path(sys.argv[2]), int(sys.argv[3]), asked, os.environ))


if __name__ == "__main__":
    raise SystemExit(refusing(main))

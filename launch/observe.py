"""Looks at runs from outside of their jobs: python -m launch.observe RUN_DIR ... [--once]

For cron or scrontab with --once, or as a loop on a login node. What the watchers inside a job
cannot do once they are dead themselves: a job that is RUNNING without a sign of life for too long
is queued again, and one that Slurm has lost or dropped without an outcome is submitted again. What
follows is the restart policy's decision (docs/restart.md), and log_only is honoured.

Exit code with --once: 0 all is well or over, 1 something was done or needs a person, 3 Slurm does
not answer, so that nothing is known.
"""

import argparse
import contextlib
import fcntl
import logging
import math
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch import scheduler
from launch.after_attempt import closed, judge, perform
from launch.cli import refusing
from launch.truth import ENDED, facts_of, job_id_of
from megatron_ext.resilience import attempts, lease
from megatron_ext.resilience.attempts import Attempt
from megatron_ext.resilience.classify import Failure
from megatron_ext.resilience.outcome import read_outcome
from megatron_ext.resilience.progress import newest_step
from megatron_ext.resilience.stop import stop_file

if TYPE_CHECKING:
    from launch.config import JobConfig

log = logging.getLogger(__name__)
OURS = "seen from outside: "
"""Begins the headline of every record that is made here."""

LEAST_SILENCE, LEAST_INTERVAL = 10.0, 1.0
"""Seconds. Watchers show a sign of life every 10 s (megatron_ext/resilience/chair.py)."""


@dataclass(frozen=True)
class Sight:
    """What is seen of a run."""

    word: str
    """``over``, ``waiting``, ``alive``, ``blind``; ``silent`` and ``lost`` ask for an action."""

    text: str = ""


def last_sign(run_dir: Path, past: list[Attempt]) -> float:
    """Seconds since anything was written for the run, by the file server's own clock."""
    paths = [run_dir / name for name in ("attempts.jsonl", "metrics.jsonl", "job", "config.yaml")]
    if past:
        folder = run_dir / "attempts" / past[-1].attempt
        paths += [folder, folder / "alive", run_dir / "logs" / f"attempt-{past[-1].number}.log"]
    times = [path.stat().st_mtime for path in paths if path.exists()]
    probe = run_dir / f".observe.{uuid.uuid4().hex}"
    probe.touch(mode=0o600)
    now = probe.stat().st_mtime
    probe.unlink()
    return now - max(times)


def look(run_dir: Path, *, silence: float) -> Sight:
    """What is true of the run in ``run_dir``. ``silence``: seconds after which it needs help."""
    past = attempts.history(run_dir)
    last = past[-1] if past else None
    if (outcome := read_outcome(run_dir)) is not None and outcome.word != "stopped":
        return Sight("over", f"{outcome.word} {outcome.cause}".strip())
    if last is not None and last.action in ("done", "stop", "hold"):
        return Sight("over", f"{last.failure}: {last.reason}")
    if stop_file(run_dir).exists():
        return Sight("over", "a person asked it to stop")
    quiet = last_sign(run_dir, past)
    if quiet < silence:
        return Sight("alive", f"last sign {quiet:.0f} s ago")
    if not scheduler.answers():
        return Sight("blind", f"Slurm does not answer; last sign {quiet:.0f} s ago")
    facts = facts_of(run_dir, past)
    state = facts.get("JobState", "")
    if state == "PENDING":
        return Sight("waiting", facts.get("Reason", ""))
    job_id = job_id_of(run_dir, past) or "(none)"
    if state and state not in ENDED:
        return Sight("silent", f"job {job_id} is {state} without a sign of life for {quiet:.0f} s")
    gone = f"is {state}" if state else "is unknown to Slurm"
    return Sight("lost", f"job {job_id} {gone}, and the run left no outcome")


def act(run_dir: Path, job: "JobConfig", sight: Sight, *, holder: str, log_only: bool) -> str:
    """Fence the run off, decide, write down, queue again or end; returns what was done.

    ``holder``: who held the lease before ``sight`` was seen.

    Raises:
        LostLease: another attempt began in the meantime, so that nothing is done.
    """
    past = attempts.history(run_dir)
    open_attempt = past[-1] if past and past[-1].ended is None else None
    name = "hang" if sight.word == "silent" else "scheduler"
    failure = Failure(name=name, headline=OURS + sight.text, root=f"{name}: {OURS}".strip())
    attempt = open_attempt or _blank(run_dir, past)
    decision, step = judge(run_dir, attempt, failure, job)
    if decision.action == "again":
        decision = replace(decision, action="requeue")  # there are no nodes to go on with
    if (tried := _in_vain(past, step)) >= job.slurm.restart.no_progress:
        decision = replace(
            decision, action="stop", reason=f"{tried} times in vain without a new checkpoint"
        )
    if not job.slurm.requeue and decision.action == "requeue":
        decision = replace(decision, action="stop", reason="slurm.requeue=false")
    if log_only or job.slurm.restart.log_only:
        return f"log only: would {decision.action}: {decision.reason}"
    # From here on a copy that still lives somewhere may not write: its next save finds the lease.
    lease.take(run_dir, f"{lease.new_attempt()}-observer", after=holder)
    record = closed(attempt, failure, decision, step=step, restarts=0)
    attempts.append(run_dir, record)
    if sight.word == "silent" and record.action == "stop":
        scheduler.cancel(record.job_id)
    with _signals_kept():
        perform(run_dir, job, replace(record, job_id="") if sight.word == "lost" else record)
    if sight.word == "lost" and record.action == "requeue":
        from launch.resume import queue_again

        queue_again(run_dir, [])
    return record.line()


def _blank(run_dir: Path, past: list[Attempt]) -> Attempt:
    """A record for a job that never began an attempt, or whose attempt has ended."""
    return Attempt(
        number=past[-1].number + 1 if past else 0,
        attempt=f"{lease.new_attempt()}-observer",
        job_id=job_id_of(run_dir, past),
        started=time.time(),
        step_before=newest_step(run_dir),
    )


def _in_vain(past: list[Attempt], step: int) -> int:
    """Times that a run was helped from here since its last new checkpoint."""
    times = 0
    for attempt in reversed(past):
        if attempt.progressed or (attempt.step_after < step and attempt.ended is not None):
            break
        times += attempt.headline.startswith(OURS)
    return times


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Requeueing ignores SIGTERM, which is right for a batch shell and wrong for a loop."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[bool]:
    """Whether no other observer looks at the run now."""
    with open(run_dir / ".observer", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def observe(run_dir: Path, *, silence: float | None, log_only: bool) -> int:
    """One look at one run; returns the exit code that it alone would give."""
    from launch.compose import load

    job = load(run_dir / "config.yaml")
    if silence is None:
        silence = float(max(job.slurm.first_heartbeat_seconds, job.watch.hang_unlearnt_seconds))
    with alone(run_dir) as free:
        if not free:
            log.info("%s: another observer is at it", run_dir)
            return 0
        holder = lease.holder(run_dir)
        sight = look(run_dir, silence=silence)
        log.info("%s: %s, %s", run_dir, sight.word, sight.text)
        if sight.word not in ("silent", "lost"):
            return 3 if sight.word == "blind" else 0
        try:
            done = act(run_dir, job, sight, holder=holder, log_only=log_only)
            log.warning("%s: %s", run_dir, done)
        except lease.LostLease as lost:
            log.info("%s: %s", run_dir, lost)
            return 0
        return 1


def main() -> int:
    """Look once, or again and again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--once", action="store_true", help="one look, for cron")
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between looks")
    parser.add_argument("--silence", type=float, help="seconds without a sign before it acts")
    parser.add_argument("--log-only", action="store_true", help="say what would be done")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    for key, least in (("silence", LEAST_SILENCE), ("interval", LEAST_INTERVAL)):
        value = getattr(args, key)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"--{key}={value:g} must be at least {least:g} seconds.")
    for run_dir in args.run_dirs:
        if not (run_dir / "config.yaml").exists():
            raise FileNotFoundError(f"{run_dir} holds no run: config.yaml is missing.")
    while True:
        codes = []
        for run_dir in args.run_dirs:
            try:
                code = observe(run_dir.absolute(), silence=args.silence, log_only=args.log_only)
            except (OSError, ValueError) as error:  # one sick folder must not blind it to others
                log.error("%s: %s", run_dir, error)
                code = 1
            codes.append(code)
        if args.once:
            return max(codes)
        time.sleep(args.interval)


if __name__ == "__main__":
    sys.exit(refusing(main))

"""The state of a run: what its folder proves, and what Slurm says beside it."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch import scheduler
from launch.after_attempt import set_aside
from megatron_ext.resilience import attempts, lock
from megatron_ext.resilience.attempts import Attempt
from megatron_ext.resilience.outcome import read_outcome
from megatron_ext.resilience.progress import booked, last_metrics, newest_step
from megatron_ext.resilience.stop import stop_file
from megatron_ext.resilience.stragglers import known

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}
QUIET_SECONDS = 600.0
NO_ANSWER = "Slurm does not answer"


@dataclass(kw_only=True)
class State:
    """What a person on call asks first."""

    run_dir: str
    truth: str
    """finished, stopped, refused, running, waiting, given up, quiet or new."""

    job_id: str = ""
    slurm: str = ""
    """Slurm's state and, while it waits, the reason and for how long."""

    step: int = 0
    total_steps: int = 0
    saved_step: int = 0
    loss: float | None = None
    tokens: int = 0
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    last_sign_seconds: float | None = None
    """Age of the newest line of metrics.jsonl."""

    ledger: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Tokens, documents, epochs and skipped windows of each source at ``saved_step``."""

    excluded: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    """Ranks that hold the others up now, one line each."""

    damaged: str = ""
    """Why config.yaml cannot be read; empty where it can."""

    cause: str = ""
    attempts: list[dict[str, Any]] = field(default_factory=list)


def queued(run_dir: Path) -> str:
    """The job that was queued or that began last; empty without one."""
    try:
        return (run_dir / "job").read_text().strip()
    except OSError:
        return ""


def job_id_of(run_dir: Path, past: list[Attempt]) -> str:
    """The job of the run that was queued or began last, by whomever it was queued."""
    return queued(run_dir) or next((a.job_id for a in reversed(past) if a.job_id), "")


def facts_of(run_dir: Path, past: list[Attempt]) -> dict[str, str]:
    """Slurm's record of that job, if it is still this run's: job ids are reused after a crash."""
    if not scheduler.present() or not (job_id := job_id_of(run_dir, past)):
        return {}
    facts = scheduler.job(job_id)
    words = facts.get("StdOut", "") + facts.get("Command", "")
    by_hand = bool(past) and past[-1].job_id == job_id and "train.sbatch" in words
    ours = (f"{run_dir.absolute()}/", f"{_array_of(run_dir.absolute(), job_id)}/list")
    return facts if by_hand or any(path in words for path in ours) else {}


def _array_of(run_dir: Path, job_id: str) -> Path:
    """The folder of the array that ``job_id`` is a run of, as launch.submit names it."""
    task = job_id.partition("_")[2]
    return run_dir.with_name(f"{run_dir.name.removesuffix(f'-{task}')}.runs")


def live_job(run_dir: Path) -> str:
    """Id of a job of this run that is queued or running; empty without one."""
    facts = facts_of(run_dir, attempts.history(run_dir))
    return facts["JobId"] if _lives(facts) else ""


def unanswered(run_dir: Path, past: list[Attempt]) -> str:
    """The job that may live and that nobody can ask about; empty where somebody answers.

    On a machine without Slurm it may live while its attempt is open and gives signs of life.
    """
    job_id = job_id_of(run_dir, past)
    last = past[-1] if past else None
    if last is not None and last.job_id == job_id and last.action in ("done", "stop", "hold"):
        return ""
    if not job_id or not scheduler.present():
        return job_id if last is not None and last.ended is None and _signs(run_dir, last) else ""
    return "" if scheduler.answers() else job_id


def _signs(run_dir: Path, last: Attempt) -> bool:
    paths = (run_dir / "attempts" / last.attempt / "alive", run_dir / "metrics.jsonl")
    newest = max([last.started, *(p.stat().st_mtime for p in paths if p.exists())])
    return time.time() - newest < QUIET_SECONDS


def refuse_live(run_dir: Path) -> None:
    """Refuse a run folder that another run writes to or will: a job of Slurm's, or a local one.

    Raises:
        ValueError: its job has not ended, or nobody can say that it has, or a process holds it.
    """
    if job_id := unanswered(run_dir, attempts.history(run_dir)):
        raise ValueError(
            f"{run_dir} is the folder of job {job_id}, and {NO_ANSWER}, so that it may not have "
            f"ended: wait until it does, or choose another name= and run_dir=."
        )
    if job_id := live_job(run_dir):
        raise ValueError(
            f"{run_dir} is the folder of job {job_id}, which has not ended: choose another name= "
            f"and run_dir=, or end it with python -m launch.stop {run_dir}."
        )
    lock.check_free(run_dir)


def look(run_dir: Path) -> State:
    """The state of the run in ``run_dir``; needs no Slurm.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: config.yaml is damaged, and nothing else tells of the run.
    """
    if not (run_dir / "config.yaml").exists():
        raise FileNotFoundError(f"{run_dir} holds no run: config.yaml is missing.")
    past = attempts.history(run_dir)
    facts = facts_of(run_dir, past)
    metrics = last_metrics(run_dir)
    state = State(run_dir=str(run_dir), truth="new", saved_step=newest_step(run_dir))
    state.job_id = facts.get("JobId", "") or job_id_of(run_dir, past)
    state.slurm = _slurm_line(facts)
    if not facts and unanswered(run_dir, past):
        state.slurm = NO_ANSWER
    state.step = int(metrics.get("step", 0))
    state.loss, state.tokens = metrics.get("loss"), int(metrics.get("tokens", 0))
    if metrics:
        state.last_sign_seconds = time.time() - (run_dir / "metrics.jsonl").stat().st_mtime
    _forecast(state, run_dir, metrics)
    state.ledger = booked(run_dir)
    state.excluded = set_aside(run_dir)
    state.slow = [s.line() for s in known(run_dir, attempt=past[-1].attempt if past else "")]
    state.attempts = [asdict(a) | {"line": a.line()} for a in past]
    state.truth, state.cause = _truth(run_dir, state, past, facts)
    if state.truth == "new" and state.damaged:
        raise ValueError(state.damaged)
    return state


def _slurm_line(facts: dict[str, str]) -> str:
    if not facts:
        return ""
    line = facts["JobState"]
    if line == "PENDING":
        line += f" ({facts.get('Reason', '')}) since {facts.get('SubmitTime', '?')}"
    return line


def _forecast(state: State, run_dir: Path, metrics: dict[str, Any]) -> None:
    """Total steps by the plan; rate and ETA from the newest step."""
    from launch.compose import load
    from megatron_ext.train.phases import Plan

    try:
        job = load(run_dir / "config.yaml")
    except ValueError as damage:
        state.damaged = str(damage)
        return
    try:
        state.total_steps = Plan.of(job).steps
    except (ValueError, AttributeError, ImportError):
        return  # a plan that cannot be read takes away the forecast and nothing else
    seconds = metrics.get("seconds") or metrics.get("step_seconds")
    if seconds:
        size = metrics.get("global_batch_size", 0) * metrics.get("seq_length", 0)
        state.tokens_per_second = size / seconds
        state.eta_seconds = max(0, state.total_steps - state.step) * seconds


def _truth(
    run_dir: Path, state: State, past: list[Attempt], facts: dict[str, str]
) -> tuple[str, str]:
    """The word, and why. The folder outranks Slurm's word."""
    last = past[-1] if past else None
    if facts.get("JobState") == "PENDING":
        return "waiting", facts.get("Reason", "")
    if _lives(facts) and (last is None or last.job_id != facts.get("JobId")):
        return "running", ""  # a new job, whose attempt is about to begin
    outcome = read_outcome(run_dir)
    over = last is not None and last.action in ("stop", "hold")
    goes_on = not over and (_lives(facts) or state.slurm == NO_ANSWER)
    if outcome is not None and (outcome.word != "stopped" or not goes_on):
        return outcome.word, outcome.cause
    if last is not None and over:
        return "given up", f"{last.failure}: {last.reason}"
    if _lives(facts):
        return "running", ""
    if last is not None and last.ended is None and facts.get("JobId") == last.job_id:
        return _unless_asked(run_dir, f"job {last.job_id} is {facts['JobState']} and left no word")
    quiet = state.last_sign_seconds
    if last is not None and last.ended is None and quiet is not None and quiet < QUIET_SECONDS:
        return "running", ""
    if state.slurm == NO_ANSWER:
        return "quiet", f"{NO_ANSWER}, so that nobody knows of job {state.job_id}"
    if last is not None and last.ended is None:
        return _unless_asked(run_dir, "an attempt began and neither ended nor gave a sign")
    if last is not None:
        return _unless_asked(run_dir, f"after {last.failure}, and no job is queued")
    if quiet is not None and quiet < QUIET_SECONDS:
        return "running", ""
    return _unless_asked(run_dir, "", otherwise="new")


def _unless_asked(run_dir: Path, cause: str, *, otherwise: str = "quiet") -> tuple[str, str]:
    """Nothing of the run lives, which is as a person wanted it where launch.stop was used."""
    if stop_file(run_dir).exists():
        return "stopped", "asked to stop, and nothing of it runs"
    return otherwise, cause


def _lives(facts: dict[str, str]) -> bool:
    return bool(facts) and facts.get("JobState") not in ENDED

"""What ended an attempt and what follows: evidence, class, decision, record, action."""

import json
import logging
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch import scheduler
from launch.health import bad_nodes
from megatron_ext.resilience import attempts, lease, suspicions
from megatron_ext.resilience.attempts import Attempt
from megatron_ext.resilience.classify import Evidence, Failure, classify
from megatron_ext.resilience.config import RestartConfig
from megatron_ext.resilience.outcome import read_outcome
from megatron_ext.resilience.policy import Decision, aside, decide, room
from megatron_ext.resilience.progress import newest_step, took_steps
from megatron_ext.resilience.stop import stop_file
from megatron_ext.resilience.stragglers import known

if TYPE_CHECKING:
    from launch.config import JobConfig

log = logging.getLogger(__name__)
TAIL_BYTES = 2 << 20


def folder_of(run_dir: Path, attempt: Attempt) -> Path:
    """What the watchers of an attempt wrote."""
    return run_dir / "attempts" / attempt.attempt


def gather(
    run_dir: Path, attempt: Attempt, *, exit_code: int | None, asked: str, ended_silently: bool
) -> Evidence:
    """Everything that is known at the end of ``attempt``."""
    outcome = read_outcome(run_dir, attempt=attempt.attempt)
    facts = {} if ended_silently else scheduler.job(attempt.job_id, tries=3)
    preempt = facts.get("PreemptTime", "None") not in ("None", "N/A", "")
    return Evidence(
        outcome=outcome.word if outcome else "",
        outcome_cause=outcome.cause if outcome else "",
        exit_code=exit_code,
        asked=asked,
        job_state=scheduler.fate(facts, attempt.restart_count),
        preempt_time=preempt and asked == "TERM",
        stop_file=stop_file(run_dir).exists(),
        lost_lease=not ended_silently and lease.holder(run_dir) != attempt.attempt,
        lost_nodes=sorted(scheduler.unusable(attempt.nodes)) if attempt.job_id else [],
        bad_nodes=bad_nodes(folder_of(run_dir, attempt)),
        watch=_watch(folder_of(run_dir, attempt)),
        log=_since_restart(
            _log(run_dir / "logs" / f"attempt-{attempt.number}.log"), folder_of(run_dir, attempt)
        ),
        took_steps=took_steps(run_dir, since=attempt.started, step_before=attempt.step_before),
        ended_silently=ended_silently,
    )


def _watch(folder: Path) -> dict[str, str]:
    """The event that ended the attempt, as the supervisors recorded it."""
    try:
        text = (folder / "last_event.json").read_text()[:65536]
        return {str(k): str(v) for k, v in json.loads(text).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _log(path: Path) -> str:
    """The two ends of the attempt's log. Length is bounded, encoding is not trusted."""
    try:
        with open(path, "rb") as file:
            head = file.read(TAIL_BYTES)
            size = file.seek(0, 2)
            file.seek(max(len(head), size - TAIL_BYTES))
            tail = file.read(TAIL_BYTES)
    except OSError:
        return ""
    return head.decode(errors="replace") + tail.decode(errors="replace")


def _since_restart(text: str, folder: Path) -> str:
    """The log after the last restart in place, whose cause has been dealt with.

    The watcher has said each event in one line. Where the bounded text lacks it, nothing is cut.
    """
    said = []
    for path in sorted(folder.glob("event-*.json"), key=lambda p: (len(p.name), p.name)):
        event = json.loads(path.read_text())
        said.append(f"{event['class']}: {str(event['headline']).partition(chr(10))[0]}\n")
    at = -1
    for _ in range(said.count(said[-1]) if said else 0):
        at = max(at, text.find(said[-1], at + 1))
    return text[at:].partition("\n")[2] if at >= 0 else text


def judge(
    run_dir: Path, attempt: Attempt, failure: Failure, job: "JobConfig | None"
) -> tuple[Decision, int]:
    """The policy's decision on ``failure``, and the step that the run stands at."""
    step = newest_step(run_dir)
    if failure.name != "superseded":  # then the history is another's to write
        release(run_dir)
    past = [a for a in attempts.history(run_dir) if a.attempt != attempt.attempt]
    decision = decide(
        failure,
        past,
        config=job.slurm.restart if job else RestartConfig(),
        progressed=step > attempt.step_before,
        pool=_pool(attempt, job),
        now=time.time(),
    )
    return decision, step


def _pool(attempt: Attempt, job: "JobConfig | None") -> int:
    if not attempt.job_id:
        return 1
    return len(scheduler.pool(job.cluster.partition if job else "")) or 1


def spare_node(run_dir: Path, job: "JobConfig", attempt: Attempt) -> bool:
    """Whether the policy would set a suspected node of ``attempt`` aside, and another is there."""
    restart, past = job.slurm.restart, attempts.history(run_dir)
    if not attempt.job_id or not job.slurm.requeue or restart.log_only:
        return False
    pool = scheduler.pool(job.cluster.partition)
    if not room(past, config=restart, pool=len(pool), now=time.time()):
        return False
    others = pool - {*attempt.nodes, *set_aside(run_dir), *job.slurm.exclude}
    return bool(others - set(scheduler.unusable(sorted(others))))


def release(run_dir: Path) -> None:
    """Take nodes back whose bad step was as bad on others: the samples were to blame."""
    cleared = {s.attempt for s in suspicions.known(run_dir).values() if s.verdict == "workload"}
    for past in attempts.history(run_dir) if cleared else []:
        if past.attempt in cleared and past.excluded:
            attempts.append(run_dir, replace(past, excluded=[], suspects=[]))


def closed(
    attempt: Attempt, failure: Failure, decision: Decision, *, step: int, restarts: int
) -> Attempt:
    """The attempt's record with its end filled in."""
    return replace(
        attempt,
        ended=time.time(),
        failure=failure.name,
        root=failure.root,
        headline=failure.headline,
        step_after=step,
        action=decision.action,
        reason=decision.reason,
        counted=decision.counted,
        suspects=list(failure.suspects),
        excluded=list(decision.newly),
        in_job_restarts=restarts,
    )


def conclude(run_dir: Path, job: "JobConfig", name: str, *, exit_code: int, asked: str) -> Attempt:
    """Classify and decide on the end of attempt ``name``, and write it down."""
    attempt = next(a for a in attempts.history(run_dir) if a.attempt == name)
    evidence = gather(run_dir, attempt, exit_code=exit_code, asked=asked, ended_silently=False)
    failure = classify(evidence)
    decision, step = judge(run_dir, attempt, failure, job)
    if decision.action in ("again", "requeue") and job.slurm.restart.log_only:
        decision = replace(decision, action="stop", reason=f"log only: would {decision.action}")
    elif decision.action in ("again", "requeue") and not job.slurm.requeue:
        decision = replace(decision, action="stop", reason="slurm.requeue=false")
    elif decision.action == "again" and (asked or evidence.lost_nodes):
        decision = replace(decision, action="requeue")  # these nodes are not ours for much longer
    restarts = len(list(folder_of(run_dir, attempt).glob("event-*.json")))
    record = closed(attempt, failure, decision, step=step, restarts=restarts)
    for half in folder_of(run_dir, attempt).glob(".*.tmp"):
        half.unlink(missing_ok=True)  # what a rank was writing when it was killed
    if job.watch.straggler_strikes:
        slow = [found.node for found in known(run_dir, attempt=name)]
        record.suspects = list(dict.fromkeys([*record.suspects, *slow]))
    if failure.name == "superseded":
        # The lease is another's, and so is the history: only its own folder may be written.
        log.warning("%s", record.line())
        return record
    attempts.append(run_dir, record)
    return record


def close_silent(run_dir: Path, attempt: Attempt) -> Attempt:
    """Write down the end of an attempt that wrote none: its batch host died or it was killed."""
    evidence = gather(run_dir, attempt, exit_code=None, asked="", ended_silently=True)
    failure = classify(evidence)
    decision, step = judge(run_dir, attempt, failure, None)
    record = closed(attempt, failure, decision, step=step, restarts=0)
    attempts.append(run_dir, record)
    return record


def set_aside(run_dir: Path) -> list[str]:
    """Nodes that attempts of the last day set aside."""
    return sorted(aside(attempts.history(run_dir), now=time.time()))


def perform(run_dir: Path, job: "JobConfig", record: Attempt) -> str:
    """Carry the decision out; returns what the batch file has to do."""
    notify(job.cluster.notify, run_dir, record)
    if record.action == "again":
        delay = _delay(run_dir, job, record)
        time.sleep(delay)
        return "again"
    if record.action == "requeue" and record.job_id:
        exclude = sorted({*set_aside(run_dir), *job.slurm.exclude})
        facts = scheduler.job(record.job_id, tries=3)
        if scheduler.fate(facts, record.restart_count) == "REQUEUED":
            return "requeue"  # by Slurm itself
        if not scheduler.requeue(record.job_id, exclude=exclude):
            # Exit code 75: a site's RequeueExit or launch.resume takes it from here.
            log.error(
                "Slurm refused to requeue job %s: python -m launch.resume %s",
                record.job_id,
                run_dir,
            )
    if record.action == "stop" and record.failure != "superseded":
        cancel_successors(run_dir)
    return record.action


def _delay(run_dir: Path, job: "JobConfig", record: Attempt) -> float:
    past = [a for a in attempts.history(run_dir) if a.attempt != record.attempt]
    failure = Failure(name=record.failure, root=record.root)
    return decide(
        failure, past, config=job.slurm.restart, progressed=record.progressed, pool=1, now=0.0
    ).delay_seconds


def cancel_successors(run_dir: Path) -> None:
    """Cancel the jobs that were chained behind this run. Doing it twice changes nothing."""
    try:
        successors = json.loads((run_dir / "successors.json").read_text())
    except (OSError, ValueError):
        return
    for job_id, job_name in successors.items():
        # A controller crash may have given the id to another job: the name must fit too.
        if scheduler.job(job_id).get("JobName") == job_name:
            scheduler.cancel(job_id)


def notify(command: list[str], run_dir: Path, record: Attempt) -> None:
    """Run the site's hook. Values are arguments of their own; its failure changes nothing."""
    if not command:
        return
    words = [*command, str(run_dir), record.failure, record.action, record.line()]
    try:
        subprocess.run(words, timeout=30, check=False, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("cluster.notify did not run: %s", error)

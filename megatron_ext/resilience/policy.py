"""The restart contract: from a failure and the history of a run to one action."""

from collections import Counter
from dataclasses import dataclass

from megatron_ext.resilience.attempts import Attempt
from megatron_ext.resilience.classify import WORKLOAD, Failure
from megatron_ext.resilience.config import RestartConfig

ACTIONS = {
    "done": "the run is finished",
    "again": "start the ranks again on the same nodes",
    "requeue": "give the nodes back and queue the job again",
    "hold": "hold the job for a person",
    "stop": "end the run; successors are cancelled",
}
EXIT_CODES = {"done": 0, "again": 0, "requeue": 75, "hold": 78, "stop": 93}

# They say nothing about the run, so that they never spend its budget.
UNCOUNTED = {"stopped", "preempted", "node", "gpu", "time_limit", "scheduler", "suspect"}
# The nodes are no longer ours, or should not be used again as they are.
NEEDS_OTHER_NODES = {"preempted", "node", "gpu", "time_limit", "stopped", "launch", "suspect"}
# An unchanged retry may help once; the second sighting at one place is the workload's.
CONFIRMED_ONCE = {"oom_device", "oom_host", "numerics", "checkpoint", "data"}
DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What follows an attempt."""

    action: str
    reason: str
    exclude: tuple[str, ...] = ()
    """Nodes to set aside, those of earlier attempts included."""

    newly: tuple[str, ...] = ()
    counted: bool = False
    delay_seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """What the batch file ends with. The reason stands in attempts.jsonl."""
        return EXIT_CODES[self.action]


def decide(
    failure: Failure,
    history: list[Attempt],
    *,
    config: RestartConfig,
    progressed: bool,
    pool: int,
    now: float,
) -> Decision:
    """The action after ``failure``. ``history`` holds the earlier attempts, oldest first.

    Args:
        progressed: a newer good checkpoint is there than when the attempt began.
        pool: nodes that the run could be given.
    """
    if (final := _final(failure)) is not None:
        return final
    counted = failure.name not in UNCOUNTED
    same, any_root = _without_progress(failure, history, progressed)
    exclude, newly = set_aside(failure, history, config=config, pool=pool, now=now)
    stop = _spent(failure, config, counted=counted, same=same, any_root=any_root)
    if stop:
        return Decision(action="stop", reason=stop, exclude=exclude, counted=counted)
    other = failure.name in NEEDS_OTHER_NODES or bool(newly)
    delay = min(config.backoff_seconds * 2.0 ** (same - 2), 600.0) if counted and same > 1 else 0.0
    return Decision(
        action="requeue" if other else "again",
        reason=_because(failure, counted=counted, same=same, config=config),
        exclude=exclude,
        newly=newly,
        counted=counted,
        delay_seconds=delay,
    )


def _final(failure: Failure) -> Decision | None:
    if failure.name == "finished":
        return Decision(action="done", reason="every step is taken and saved")
    if failure.name == "superseded":
        return Decision(action="stop", reason="a newer copy of this run is at work")
    if failure.name == "cancelled":
        return Decision(action="stop", reason="a person stopped it")
    if failure.name == "stopped" and failure.headline in ("interrupted", "asked to stop"):
        return Decision(action="stop", reason="a person stopped it")
    if failure.name == "config":
        return Decision(action="stop", reason="an unchanged retry fails the same way")
    return None


def _spent(
    failure: Failure, config: RestartConfig, *, counted: bool, same: int, any_root: int
) -> str:
    """Why there is no further attempt; empty when there is one."""
    if not counted:
        return ""
    if failure.name == "oom_device" and failure.at_start:
        return "device memory is too small for this configuration"
    if failure.name in CONFIRMED_ONCE and same >= 2:
        return f"{failure.name} again after a confirming retry"
    if same >= config.no_progress:
        return f"{same} attempts ended with the same cause and no new checkpoint"
    if any_root >= config.ceiling:
        return f"{any_root} attempts ended without a new checkpoint"
    return ""


def _without_progress(
    failure: Failure, history: list[Attempt], progressed: bool
) -> tuple[int, int]:
    """Counted attempts since the last progress, this one included: of this root, and of any."""
    if progressed:
        return 1, 1
    same = any_root = 1
    for attempt in reversed(history):
        if attempt.counted:
            any_root += 1
            same += attempt.root == failure.root
        if attempt.progressed:
            # That attempt failed after its checkpoint: it is the first at this place.
            break
    return same, any_root


def _because(failure: Failure, *, counted: bool, same: int, config: RestartConfig) -> str:
    if not counted:
        return "does not count"
    return f"{same} of {config.no_progress} with this cause and no new checkpoint"


def set_aside(
    failure: Failure,
    history: list[Attempt],
    *,
    config: RestartConfig,
    pool: int,
    now: float,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Nodes to stay off, and those of them that are new. At most a share of the pool a day.

    A node that died, whose GPU broke or that is suspected goes at once; others go at their last
    strike. The oldest entries leave first: a node comes back a day later unless it fails again.
    """
    day = _last_day(history, now)
    known = aside(history, now=now)
    strikes = Counter(node for a in day for node in a.suspects)
    strikes.update(failure.suspects)
    if failure.name in WORKLOAD:
        wanted: list[str] = []
    elif failure.name in ("node", "gpu", "suspect"):
        wanted = list(failure.suspects)
    else:
        wanted = [node for node in failure.suspects if strikes[node] >= config.strikes]
    left = room(history, config=config, pool=pool, now=now)
    newly = [node for node in dict.fromkeys(wanted) if node not in known][:left]
    return (*known, *newly), tuple(newly)


def aside(history: list[Attempt], *, now: float) -> list[str]:
    """Nodes that were set aside within the last day, in that order."""
    return list(dict.fromkeys(node for a in _last_day(history, now) for node in a.excluded))


def room(history: list[Attempt], *, config: RestartConfig, pool: int, now: float) -> int:
    """Nodes that may still be set aside today."""
    return max(0, max(1, pool * config.exclude_percent // 100) - len(aside(history, now=now)))


def _last_day(history: list[Attempt], now: float) -> list[Attempt]:
    return [a for a in history if a.ended is not None and now - a.ended < DAY]

"""What ended an attempt: one class and one root, from facts first and log text last."""

import re
from dataclasses import dataclass, field, replace

from megatron_ext.resilience.log_rules import ECHOES, HANDLED, MISSING_FILE, RULES, Rule

CLASSES = {
    "finished": "last step taken and its checkpoint verified",
    "stopped": "told to stop, state saved",
    "superseded": "a newer copy of the run took over",
    "cancelled": "cancelled by a person",
    "preempted": "the scheduler wanted the nodes",
    "time_limit": "the time limit came before a save",
    "node": "a node died, was drained or was lost from the network",
    "gpu": "a GPU reported a fault",
    "network": "a link or peer was unreachable, and nothing earlier says why",
    "hang": "no progress within the deadline",
    "launch": "ranks never gave a first sign of life",
    "process": "a rank was killed by a signal",
    "crash": "a rank ended with an error of unknown cause",
    "short_exit": "a rank ended with code 0 before the run was finished",
    "oom_device": "device memory ran out",
    "oom_host": "host memory ran out",
    "storage": "disk full, read-only, stale or failing",
    "checkpoint": "a checkpoint is damaged or does not fit",
    "data": "a record or data file is bad",
    "numerics": "NaN, Inf or a spike beyond what the policy may pass over",
    "suspect": "one node alone got a step wrong twice: to be taken again without it",
    "config": "the configuration or the installation is wrong",
    "scheduler": "the scheduler refused or could not be reached",
}

# Where a fault comes from. Workload faults come back unchanged; infrastructure faults do not.
WORKLOAD = {"config", "oom_device", "numerics", "data", "checkpoint"}
INFRASTRUCTURE = {"node", "gpu", "network", "preempted", "scheduler", "storage", "launch"}
# Of what all nodes share: whoever met it first is not to blame.
SHARED = {"storage", "scheduler"}

MAX_LOG_BYTES = 1 << 20  # of each end of a log: a gigabyte of noise costs no more than this


@dataclass(kw_only=True)
class Evidence:
    """All that is known at the end of an attempt. Only ``log`` is text that a rank could forge."""

    outcome: str = ""
    """The outcome word of this attempt, verified; empty when it left none."""

    outcome_cause: str = ""
    exit_code: int | None = None
    """srun's or the launcher's. Never proof by itself: srun is 0 on some node losses."""

    asked: str = ""
    """Signal that the batch shell was sent: ``USR2``, ``TERM`` or empty."""

    job_state: str = ""
    """The scheduler's word for the job, such as RUNNING, CANCELLED, PREEMPTED or REQUEUED."""

    preempt_time: bool = False
    """The scheduler says that it is preempting the job."""

    stop_file: bool = False
    """A person asked through launch.stop."""

    lost_lease: bool = False
    lost_nodes: list[str] = field(default_factory=list)
    """Nodes of the attempt that are down, drained or not answering now."""

    bad_nodes: dict[str, str] = field(default_factory=dict)
    """Nodes that the health check found bad, and why."""

    watch: dict[str, str] = field(default_factory=dict)
    """What the supervisors recorded first: class, rank, node, headline."""

    log: str = ""
    took_steps: bool = False
    """Training steps were taken. Then the configuration was right when the attempt began."""

    ended_silently: bool = False
    """No end was recorded: whatever watched the attempt died with it."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The class of an ending, with what a person should read and a policy may compare."""

    name: str
    headline: str = ""
    root: str = ""
    suspects: tuple[str, ...] = ()
    """Nodes that the cause points at. Echoes on other nodes never count."""

    at_start: bool = False
    """It came before the first step, as what is wrong with a configuration does."""


def classify(evidence: Evidence) -> Failure:
    """Facts before text: lease, outcome, scheduler, nodes, watchers; then the log's first cause."""
    failure = (
        _from_outcome(evidence)
        or _from_scheduler(evidence)
        or _from_nodes(evidence)
        or _from_requeue(evidence)
        or _from_watch(evidence)
        or _from_log(evidence)
        or _from_exit(evidence)
    )
    return replace(failure, at_start=not evidence.took_steps)


def _failure(name: str, headline: str = "", suspects: tuple[str, ...] = ()) -> Failure:
    return Failure(
        name=name, headline=headline, root=f"{name}: {_normal(headline)}", suspects=suspects
    )


def _from_outcome(evidence: Evidence) -> Failure | None:
    if evidence.lost_lease:
        return _failure("superseded")
    if evidence.outcome == "finished":
        return _failure("finished")
    if evidence.outcome == "refused" and not evidence.took_steps:
        found = match(evidence.outcome_cause)
        name = found[0].name if found and found[0].name in WORKLOAD else "config"
        return _failure(name, evidence.outcome_cause)
    if evidence.outcome == "stopped":
        cause = evidence.outcome_cause
        if evidence.job_state.startswith("CANCELLED") or evidence.stop_file:
            return _failure("cancelled", cause)
        return _failure("stopped", cause)
    return None


def _from_scheduler(evidence: Evidence) -> Failure | None:
    state = evidence.job_state
    if state.startswith("CANCELLED") or evidence.stop_file:
        return _failure("cancelled")
    if state == "PREEMPTED" or evidence.preempt_time:
        return _failure("preempted")
    if state in ("NODE_FAIL", "BOOT_FAIL"):
        return _failure("node", f"Slurm: {state}", tuple(evidence.lost_nodes))
    if state in ("TIMEOUT", "DEADLINE"):
        return _failure("time_limit", f"Slurm: {state}")
    if state == "OUT_OF_MEMORY":
        return _failure("oom_host", "Slurm: OUT_OF_MEMORY")
    return None


def _from_nodes(evidence: Evidence) -> Failure | None:
    if evidence.lost_nodes:
        nodes = tuple(evidence.lost_nodes)
        return _failure("node", f"lost {', '.join(nodes)}", nodes)
    for node, why in evidence.bad_nodes.items():
        found = match(why)
        name = found[0].name if found and found[0].name in ("gpu", "storage") else "node"
        # What all nodes share is full or gone: no node is to blame, and no other one would help.
        return _failure(name, f"{node}: {why}", () if name == "storage" else (node,))
    return None


def _from_requeue(evidence: Evidence) -> Failure | None:
    """Slurm queued the job again by itself, and not for a lost node."""
    return _failure("preempted") if evidence.job_state == "REQUEUED" else None


def _from_watch(evidence: Evidence) -> Failure | None:
    name = evidence.watch.get("class", "")
    if name not in CLASSES:
        return None
    if name in ("process", "crash"):
        # The supervisor knows only that a rank ended; a log may know why.
        found = match(evidence.log)
        headline = evidence.watch.get("headline", "")
        if found and found[0] not in ECHOES:
            name, headline = _named(found[0], evidence), found[1]
    else:
        headline = evidence.watch.get("headline", "")
    node = evidence.watch.get("node", "")
    suspects = (node,) if node and name not in WORKLOAD | SHARED else ()
    return _failure(name, headline, suspects)


def _from_log(evidence: Evidence) -> Failure | None:
    found = match(evidence.log)
    if found is None:
        return None
    rule, line = found
    suspects = tuple(dict.fromkeys(NODE_IN_LINE.findall(line))) if rule.names_node else ()
    return _failure(_named(rule, evidence), line, suspects)


def _named(rule: Rule, evidence: Evidence) -> str:
    """The rule's class, unless steps were taken: then no setting was wrong, something changed."""
    if rule.name == "config" and evidence.took_steps:
        return "storage" if rule is MISSING_FILE else "crash"
    return rule.name


def _from_exit(evidence: Evidence) -> Failure:
    code = evidence.exit_code
    if evidence.ended_silently or code is None:
        return _failure("node", "ended without a word")
    if evidence.asked == "USR2":
        return _failure("time_limit", "no save within the warning time")
    if evidence.asked == "TERM":
        return _failure("preempted", "no save within the grace time")
    if code == 0:
        return _failure("short_exit", "exit code 0 without an outcome")
    if code > 128:
        return _failure("process", f"ended by signal {code - 128}")
    if code == 2:
        return _failure("config", "exit code 2: refused")
    return _failure("crash", f"exit code {code}")


NODE_IN_LINE = re.compile(r"\bon node ([\w.-]+)|\bnode ([\w.-]+)", re.I)
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
PREFIX = re.compile(r"^(?:\[?(?:rank)?\d+\]?:\s*|\d+:\s+|\[default\d+\]:)")


def match(log: str) -> tuple[Rule, str] | None:
    """The strongest rule that the log meets and the first line that meets it."""
    best: tuple[Rule, str] | None = None
    for line in dict.fromkeys(bounded(log).splitlines()):  # noise repeats itself
        line = PREFIX.sub("", ANSI.sub("", line[:2000])).strip()
        if HANDLED.search(line):
            continue
        for rule in RULES:
            if best is not None and rule.weight <= best[0].weight:
                continue
            if rule.pattern.search(line) and not (rule.unless and rule.unless.search(line)):
                best = (rule, line[:300])
    return best


def bounded(log: str) -> str:
    """The two ends of a log, whole lines of which are worth reading."""
    if len(log) <= 2 * MAX_LOG_BYTES:
        return log
    return log[:MAX_LOG_BYTES] + "\n" + log[-MAX_LOG_BYTES:]


def _normal(headline: str) -> str:
    """The headline without what differs between two sightings of one cause."""
    text = re.sub(r"0x[0-9a-fA-F]+|\b[0-9a-f]{8,}\b", "#", headline)
    text = re.sub(r"(/[\w.+-]+)+", "/", text)
    return re.sub(r"\d+([.,:]\d+)*", "#", text)[:160]

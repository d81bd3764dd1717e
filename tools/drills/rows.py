"""Rows of the fault matrix that one machine can run."""

from dataclasses import dataclass

from tools.drills.node_faults import away, drained, flap, lemon, lose_node, prolog
from tools.drills.rank_faults import (
    Inject,
    alternating,
    crash_loop,
    in_place,
    lingers,
    numeric,
    often_with_progress,
    one_node,
    out_of_memory,
    replica,
    terminated,
    torchrun,
    watcher_killed,
    wrong_config,
)
from tools.drills.scheduler_faults import (
    batch_shell_killed,
    cancelled,
    chain_stopped,
    controller_away,
    preempted,
    record_lost,
    stopped,
    time_limit,
    two_copies,
)
from tools.drills.slow_faults import stopped_by_turns
from tools.drills.storage_faults import (
    changed_file,
    disk_full,
    killed_in_save,
    poison_record,
    torn_checkpoint,
)


@dataclass(frozen=True)
class Row:
    """One kind of fault."""

    numbers: str
    """Rows of the fault table in docs/reliability.md."""

    what: str
    inject: Inject
    """Runs it under the given name; returns what did not hold."""

    net: bool = False
    """Needs nodes with addresses of their own."""


ROWS = [
    Row("1", "rank killed", in_place("kill", "process")),
    Row("1", "rank killed under torchrun", torchrun),
    Row("2", "exception on one rank", in_place("exception", "crash")),
    Row("3", "segmentation fault", in_place("segfault", "process")),
    Row("3", "abort", in_place("abort", "process")),
    Row("4", "host memory runs out", out_of_memory),
    Row("5", "rank exits 0 early", in_place("exit0", "crash")),
    Row("6", "watcher killed", watcher_killed),
    Row("7", "SIGTERM to one rank", terminated),
    Row("8", "ranks die in a background save", killed_in_save),
    Row("9", "rank stopped", in_place("stop", "hang")),
    Row("10", "interpreter held", in_place("hold", "hang")),
    Row("12", "rank asleep in the loop", in_place("sleep", "hang")),
    Row("14", "hang at exit", lingers),
    Row("15", "rank stopped and continued by turns", stopped_by_turns),
    Row("17", "power loss of rank 0's node", lose_node("n1")),
    Row("17", "batch shell killed, resumed by hand", batch_shell_killed("resume")),
    Row("17", "batch shell killed, seen from outside", batch_shell_killed("observe")),
    Row("18", "power loss of another node", lose_node("n2")),
    Row("19", "node frozen, comes back", away("freeze", "thaw", "n1")),
    Row("20", "network cut, mended", away("cut", "mend", "n2"), net=True),
    Row("21", "pause of two seconds", flap),
    Row("22", "a node on which everything dies", lemon),
    Row("25", "too few nodes", drained),
    Row("26", "prolog fails on a node", prolog),
    Row("27", "preempted at once", preempted("low")),
    Row("27", "preempted with grace", preempted("grace")),
    Row("28", "time limit", time_limit),
    Row("29", "cancelled by a person, resumed", cancelled),
    Row("29", "stopped by a person, resumed", stopped),
    Row("30", "controller away", controller_away),
    Row("31", "two copies", two_copies),
    Row("32", "job record lost", record_lost),
    Row("34", "chain stopped, twice", chain_stopped),
    Row("35", "disk full while saving", disk_full),
    Row("37", "newest checkpoint torn", torn_checkpoint),
    Row("44", "NaN once", numeric("nan")),
    Row("45", "NaN every time on one node", one_node),
    Row("46", "NaN every time on any node", numeric("nan_stays")),
    Row("47", "loss spike once", numeric("spike")),
    Row("47", "loss spike every time", numeric("spike_stays")),
    Row("47", "gradient spike once", numeric("steep")),
    Row("47", "gradient spike every time", numeric("steep_stays")),
    Row("48", "a weight's sign flipped on one rank", replica("flip")),
    Row("49", "a weight one ulp off on one rank", replica("ulp")),
    Row("50", "token outside the vocabulary", poison_record),
    Row("51", "data file changed under the run", changed_file),
    Row("52", "crash loop", crash_loop),
    Row("53", "a kill every two checkpoints, eight times", often_with_progress),
    Row("54", "two causes in turn", alternating),
    Row("55", "wrong configuration", wrong_config),
]

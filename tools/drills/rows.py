"""Rows of the fault matrix that one machine can run."""

from dataclasses import dataclass

from tools.drills.cluster_faults import (
    cancelled,
    controller_away,
    cut,
    drained,
    flap,
    freeze,
    lose_node,
    preempted,
    stopped,
    time_limit,
    two_copies,
)
from tools.drills.rank_faults import (
    Inject,
    crash_loop,
    flipped,
    in_place,
    numeric,
    terminated,
    torchrun,
    torn_checkpoint,
    watcher_killed,
    wrong_config,
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
    Row("5", "rank exits 0 early", in_place("exit0", "crash")),
    Row("6", "watcher killed", watcher_killed),
    Row("7", "SIGTERM to one rank", terminated),
    Row("9", "rank stopped", in_place("stop", "hang")),
    Row("10", "interpreter held", in_place("hold", "hang")),
    Row("12", "rank asleep in the loop", in_place("sleep", "hang")),
    Row("17", "power loss of rank 0's node", lose_node("n1")),
    Row("18", "power loss of another node", lose_node("n2")),
    Row("19", "node frozen, comes back", freeze),
    Row("20", "network cut, mended", cut, net=True),
    Row("21", "pause of two seconds", flap),
    Row("25", "too few nodes", drained),
    Row("27", "preempted at once", preempted("low")),
    Row("27", "preempted with grace", preempted("grace")),
    Row("28", "time limit", time_limit),
    Row("29", "cancelled by a person, resumed", cancelled),
    Row("29", "stopped by a person, resumed", stopped),
    Row("30", "controller away", controller_away),
    Row("31", "two copies", two_copies),
    Row("37", "newest checkpoint torn", torn_checkpoint),
    Row("44", "NaN once", numeric("nan")),
    Row("46", "NaN every time", numeric("nan_stays")),
    Row("48", "a weight's sign flipped on one rank", flipped),
    Row("52", "crash loop", crash_loop),
    Row("55", "wrong configuration", wrong_config),
]

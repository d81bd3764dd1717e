"""Ranks that die, hang or leave early are noticed, named, and started again in place."""

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ext.resilience.child import Child
from megatron_ext.resilience.config import WatchConfig
from megatron_ext.resilience.council import STACK_SECONDS, Council
from megatron_ext.resilience.deadlines import ENOUGH, NAMING_SECONDS, Deadlines
from megatron_ext.resilience.heartbeat import Heartbeat
from megatron_ext.resilience.suspicions import SUSPECT_EXIT, UNSOUND_EXIT
from megatron_ext.resilience.watcher import Watcher
from megatron_ext.testing import run_under_watchers

STEPS = 40
# Waits under the file name by which a real collective shows in a rank's stacks.
COLLECTIVE: dict[str, Callable[[Path, str, int], None]] = {}
SOURCE = """
def wait(folder, pattern, count):
    while len(list(folder.glob(pattern))) < count:
        time.sleep(0.005)
"""
exec(compile(SOURCE, "torch/distributed/distributed_c10d.py", "exec"), {"time": time}, COLLECTIVE)
Fault = Callable[[int], None]


def _rank(watcher: Watcher, port: int, folder: Path, fault: Fault, at: int) -> int:
    """A rank in small: steps of 20 ms from the saved step on, all ranks in step by files."""
    beat, rank = watcher.heartbeat, watcher.seat.rank
    saved = folder / "saved"
    step = int(saved.read_text()) if saved.exists() else 0
    beat.enter("between")
    while step < STEPS:
        beat.enter("step")
        if step == at and rank == 1 and not (folder / "struck").exists():
            (folder / "struck").touch()
            fault(rank)
        (folder / f"at-{rank}-{step}-{port}").touch()
        COLLECTIVE["wait"](folder, f"at-*-{step}-{port}", watcher.seat.world_size)
        time.sleep(0.02)
        step += 1
        beat.step_done(step, regime=0)
        if rank == 0 and step % 10 == 0:
            (folder / ".saved").write_text(str(step))
            (folder / ".saved").rename(saved)
    return 0


def _run(folder: Path, fault: Fault, *, at: int = 25, ranks: int = 3) -> list[int]:
    """Exit codes of the watchers of a run in which rank 1 meets ``fault`` before step ``at``."""
    ends = run_under_watchers(
        folder,
        lambda watcher, port: _rank(watcher, port, folder, fault, at),
        world_size=ranks,
        watch=WatchConfig(hang_floor_seconds=1.0),
        first_seconds=10.0,
    )
    return [end.code for end in ends]


def _raise(_rank: int) -> None:
    raise RuntimeError("planned")


def _stop(_rank: int) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hold_interpreter(_rank: int) -> None:
    while True:  # a signal ends the sleep
        ctypes.PyDLL(None).sleep(1000)


def _busy(_rank: int) -> None:
    threading.Event().wait(1000)


FAULTS = {
    "killed": (lambda _: os.kill(os.getpid(), signal.SIGKILL), "process", "signal 9"),
    "segfault": (lambda _: ctypes.string_at(0), "process", "signal 11"),
    "abort": (lambda _: os.abort(), "process", "signal 6"),
    "exception": (_raise, "crash", "RuntimeError: planned"),
    "stopped": (_stop, "hang", "rank 1 on n1 is stopped"),
    "asleep": (_busy, "hang", "rank 1 on n1"),
    "interpreter held": (_hold_interpreter, "hang", "rank 1 on n1"),
}


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_ranks_go_on_in_place_after(name: str, tmp_path: Path) -> None:
    fault, kind, headline = FAULTS[name]
    start = time.monotonic()
    assert _run(tmp_path, fault) == [0, 0, 0]
    event = json.loads((tmp_path / "event-0.json").read_text())
    assert (event["class"], event["rank"], event["node"]) == (kind, 1, "n1")
    assert headline in event["headline"]
    assert time.monotonic() - start < 30
    assert int((tmp_path / "saved").read_text()) == STEPS
    assert not list(tmp_path.glob(".beat*"))


def test_a_hang_leaves_the_stacks_of_every_rank(tmp_path: Path) -> None:
    _run(tmp_path, _busy)
    assert "_busy" in (tmp_path / "rank-1.0.stacks").read_text()
    assert "_rank" in (tmp_path / "rank-0.0.stacks").read_text()


def test_the_same_step_failing_twice_ends_the_attempt(tmp_path: Path) -> None:
    def always(_rank: int) -> None:
        (tmp_path / "struck").unlink()
        raise RuntimeError("planned")

    assert _run(tmp_path, always) == [1, 1, 1]
    assert (tmp_path / "event-0.json").exists()
    assert not (tmp_path / "event-1.json").exists()
    assert json.loads((tmp_path / "last_event.json").read_text())["class"] == "crash"


def test_a_lost_watcher_is_a_lost_node(tmp_path: Path) -> None:
    def take_parent(_rank: int) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    codes = _run(tmp_path, take_parent)
    assert codes == [1, -9, 1]
    event = json.loads((tmp_path / "last_event.json").read_text())
    assert (event["class"], event["node"]) == ("node", "n1")


def test_a_wrong_configuration_is_not_tried_again_in_place(tmp_path: Path) -> None:
    def refuse(_rank: int) -> None:
        raise ValueError("model.hidden_size=7 is not a multiple of 8")

    assert _run(tmp_path, refuse, at=0) == [1, 1, 1]
    assert json.loads((tmp_path / "last_event.json").read_text())["class"] == "config"
    assert not (tmp_path / "event-0.json").exists()


def test_a_rank_that_is_not_in_the_collective_is_the_one_that_hangs() -> None:
    council = Council(3, 10.0, 0.0)
    status = {"generation": 0, "alive": True, "code": None, "step": 7, "count": 20}
    status |= {"section": "step", "overdue": 0.0, "process": "S", "error": ""}
    status |= {"calls": 31, "call": "all_reduce", "frame": "loop.py:84 fit", "unfit": ""}
    for rank in range(3):
        council.hear(rank, {**status, "host": f"n{rank}"}, 0.0)
    assert [order.verb for order in council.tick(0.0)] == ["start"]
    council.hear(0, {**status, "host": "n0", "overdue": 9.0}, 1.0)
    assert [order.verb for order in council.tick(1.0)] == ["stacks"]
    council.hear(2, {**status, "host": "n2", "call": "", "frame": "feed.py:7 step"}, 2.0)
    orders = council.tick(3.0)
    assert [order.verb for order in orders] == ["kill"]
    assert council.event is not None
    assert (council.event.rank, council.event.node) == (2, "n2")
    assert "is behind, in feed.py:7 step" in council.event.headline


def test_where_all_wait_the_rank_in_another_collective_than_most_is_the_one() -> None:
    council = Council(4, 10.0, 0.0)
    status = {"generation": 0, "alive": True, "code": None, "step": 7, "count": 20, "error": ""}
    status |= {"section": "step", "overdue": 9.0, "process": "S", "unfit": "", "calls": 31}
    for rank in range(4):
        council.hear(rank, {**status, "host": f"n{rank}", "call": "?", "frame": ""}, 0.0)
    council.tick(0.0)
    council.tick(1.0)
    for rank in range(4):
        place = ("broadcast", "loop.py:9 f") if rank == 1 else ("all_reduce", "stop.py:8 g")
        told = dict(zip(("call", "frame"), place, strict=True))
        council.hear(rank, {**status, "host": f"n{rank}", **told}, 2.0)
    council.tick(3.0)
    assert council.event is not None
    assert (council.event.rank, council.event.node) == (1, "n1")
    assert council.event.headline.endswith(
        "rank 1 on n1 is in another collective than its peers: rank 1 at call 31 (broadcast of "
        "loop.py:9 f); ranks 0, 2, 3 at call 31 (all_reduce of stop.py:8 g)"
    )


def test_a_node_that_turns_unfit_during_the_run_ends_the_attempt(tmp_path: Path) -> None:
    def sick(_rank: int) -> None:
        (tmp_path / "unfit-1").write_text("Xid 79")
        _busy(_rank)

    assert _run(tmp_path, sick) == [1, 1, 1]
    event = json.loads((tmp_path / "last_event.json").read_text())
    assert (event["class"], event["node"], event["headline"]) == ("node", "n1", "Xid 79")


def test_a_lost_connection_that_is_heard_of_first_is_still_an_echo() -> None:
    council = Council(2, 10.0, 0.0)
    status = {"generation": 0, "alive": True, "code": None, "step": 7, "count": 20}
    status |= {"section": "step", "overdue": 0.0, "process": "S", "error": "", "collective": True}
    status |= {"calls": 3, "call": "", "frame": "", "unfit": ""}
    for rank in range(2):
        council.hear(rank, {**status, "host": f"n{rank}"}, 0.0)
    council.tick(0.0)
    dead = {**status, "alive": False, "code": 1}
    lost = "RuntimeError: [../gloo/transport/tcp/pair.cc] Connection closed by peer"
    council.hear(0, {**dead, "host": "n0", "error": lost}, 1.0)
    council.tick(1.0)
    council.hear(1, {**dead, "host": "n1", "error": "MemoryError"}, 1.8)
    council.tick(2.5)
    assert council.event is not None
    assert (council.event.rank, council.event.headline) == (1, "MemoryError")


@pytest.mark.parametrize(
    ("code", "blamed", "name", "verbs"),
    [(SUSPECT_EXIT, 1, "suspect", ["end"]), (UNSOUND_EXIT, 0, "numerics", ["start"])],
)
def test_exit_codes_of_bad_steps_are_facts(
    code: int, blamed: int, name: str, verbs: list[str]
) -> None:
    council = Council(2, 10.0, 0.0)
    status = {"generation": 0, "alive": True, "code": None, "step": 7, "count": 20, "error": ""}
    status |= {"section": "step", "overdue": 0.0, "process": "S", "calls": 3, "call": ""}
    status |= {"frame": "", "unfit": ""}
    for rank in range(2):
        council.hear(rank, {**status, "host": f"n{rank}"}, 0.0)
    council.tick(0.0)
    dead = {**status, "alive": False, "code": 1, "host": "n0", "error": "RuntimeError: else"}
    council.hear(0, dead, 1.0)
    council.tick(1.0)
    council.hear(1, {**dead, "host": "n1", "code": SUSPECT_EXIT, "error": "a NaN again"}, 1.5)
    if code == UNSOUND_EXIT:  # of all ranks
        council.hear(0, {**dead, "code": code}, 1.0)
        council.hear(1, {**dead, "host": "n1", "code": code}, 1.5)
    assert [order.verb for order in council.tick(2.5)] == ["kill"]
    assert council.event is not None
    assert (council.event.name, council.event.rank) == (name, blamed)
    # A suspected rank comes before echoes, and is not started in place.
    assert [order.verb for order in council.tick(2.6)] == verbs


def test_a_late_rank_is_forgiven_when_it_goes_on_before_it_is_named() -> None:
    council = Council(1, 10.0, 0.0)
    status = {"generation": 0, "alive": True, "code": None, "step": 7, "count": 20, "host": "n0"}
    status |= {"section": "step", "process": "S", "error": "", "calls": 3, "call": "", "frame": ""}
    status |= {"unfit": ""}
    council.hear(0, {**status, "overdue": 0.0}, 0.0)
    council.tick(0.0)
    council.hear(0, {**status, "overdue": 3.4}, 1.0)
    assert [order.verb for order in council.tick(1.0)] == ["stacks"]
    council.hear(0, {**status, "overdue": 0.0}, 1.0 + STACK_SECONDS)
    assert council.tick(1.1 + STACK_SECONDS) == []
    assert (council.phase, council.event) == ("run", None)


def test_ranks_that_never_come_are_named() -> None:
    council = Council(2, 10.0, 0.0)
    assert council.tick(9.0) == []
    (order,) = council.tick(11.0)
    assert (order.verb, order.code) == ("end", 1)
    assert order.event is not None
    assert order.event.name == "launch"


def test_deadlines_are_learnt_for_each_amount_of_work_and_saves_have_their_own() -> None:
    beat = Heartbeat()
    deadlines = Deadlines(WatchConfig(hang_floor_seconds=5.0, hang_unlearnt_seconds=900.0))
    beat.enter("step")
    for step in range(ENOUGH):
        assert deadlines.seconds(beat.read()) == 900.0
        beat.step_done(step + 1, regime=8)
        deadlines.observe(beat.read())
        beat.enter("step")
    # By 3 x p99 + 5 s it is named: stacks are asked for that much earlier.
    bar = 3 * beat.read().p99_seconds + 5.0
    assert deadlines.seconds(beat.read()) == pytest.approx(bar - NAMING_SECONDS)
    assert STACK_SECONDS < NAMING_SECONDS < 5.0
    beat.step_done(ENOUGH + 1, regime=16)
    beat.enter("step")
    assert deadlines.seconds(beat.read()) == 900.0
    beat.enter("save")
    assert deadlines.seconds(beat.read()) == 900.0
    beat.enter("between")
    beat.enter("save")
    assert deadlines.seconds(beat.read()) == 60.0


def test_watching_costs_microseconds_a_step() -> None:
    beat = Heartbeat()
    start = time.perf_counter()
    for step in range(1000):
        beat.enter("step")
        beat.step_done(step, regime=0)
    assert (time.perf_counter() - start) / 1000 < 1e-3


def test_a_child_takes_what_it_started_with_it(tmp_path: Path) -> None:
    def task() -> int:
        if os.fork() == 0:
            (tmp_path / "grandchild").write_text(str(os.getpid()))
            time.sleep(100)
        time.sleep(100)
        return 0

    child = Child(task, stacks=tmp_path / "stacks", error=tmp_path / "error")
    while not (tmp_path / "grandchild").exists():
        time.sleep(0.01)
    time.sleep(0.05)
    child.kill()
    pid = int((tmp_path / "grandchild").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or ") Z" in state.read_text():
            break
        time.sleep(0.02)
    else:
        pytest.fail("the grandchild lives on")

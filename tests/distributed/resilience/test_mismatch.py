"""Ranks that hang in different collectives: the report names who departed, and its frame."""

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext.parallel.waiting import waits
from megatron_ext.resilience.config import WatchConfig
from megatron_ext.resilience.watcher import Watcher
from megatron_ext.testing import run_under_watchers

STEPS, STRUCK = 12, 6


def _sums(step: int) -> None:
    dist.all_reduce(torch.ones(4))


def _news(step: int) -> None:
    dist.broadcast(torch.ones(4), src=0)


def _rank(watcher: Watcher, port: int, folder: Path) -> int:
    """Steps of two collectives; the odd one leaves out the first of them once."""
    rank, ranks = watcher.seat.rank, watcher.seat.world_size
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting-{port}", rank=rank, world_size=ranks
    )
    watcher.heartbeat.enter("between")
    waits().shown = watcher.heartbeat.calls
    for step in range(STEPS):
        watcher.heartbeat.enter("step")
        skips = step == STRUCK and rank == 1 and not (folder / "struck").exists()
        if skips:
            (folder / "struck").touch()
        else:
            _sums(step)
        _news(step)
        watcher.heartbeat.step_done(step + 1, regime=0)
    (folder / f"done-{rank}").touch()
    return 0


def _run(folder: Path, ranks: int) -> dict:
    """The event of a run on real gloo ranks in which rank 1 skips an all-reduce."""
    attempt = folder / "attempts" / "a"
    attempt.mkdir(parents=True)
    ends = run_under_watchers(
        attempt,
        lambda watcher, port: _rank(watcher, port, folder),
        world_size=ranks,
        watch=WatchConfig(hang_unlearnt_seconds=5.0),
    )
    assert [end.code for end in ends] == [0] * ranks
    assert len(list(folder.glob("done-*"))) == ranks
    event: dict = json.loads((attempt / "event-0.json").read_text())
    return event


def test_the_odd_one_of_three_is_named_with_its_call_and_frame(tmp_path: Path) -> None:
    began = time.monotonic()
    event = _run(tmp_path, 3)
    calls = 2 * STRUCK + 1
    assert (event["class"], event["rank"], event["node"]) == ("hang", 1, "n1")
    assert f"rank 1 at call {calls} (broadcast of resilience/test_mismatch.py:" in event["headline"]
    assert f"ranks 0, 2 at call {calls} (all_reduce of " in event["headline"]
    assert event["headline"].count("_news") == event["headline"].count("_sums") == 1
    assert time.monotonic() - began < 120


def test_of_two_both_are_named(tmp_path: Path) -> None:
    event = _run(tmp_path, 2)
    assert event["class"] == "hang"
    assert "rank 1 at call 13 (broadcast of " in event["headline"]
    assert "rank 0 at call 13 (all_reduce of " in event["headline"]

"""Ranks of our own: all of them run, and one that fails ends the rest with its exit code."""

import os
import signal
import time

from launch.ranks import start_ranks


def test_every_rank_runs_and_knows_who_it_is(tmp_path):
    def main() -> int:
        name = f"{os.environ['RANK']}-{os.environ['WORLD_SIZE']}-{os.environ['LOCAL_WORLD_SIZE']}"
        (tmp_path / name).touch()
        return 0

    assert start_ranks(3, main) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0-3-3", "1-3-3", "2-3-3"]


def test_a_failing_rank_ends_the_others_and_gives_its_code():
    def main() -> int:
        if os.environ["RANK"] == "1":
            return 7
        time.sleep(60)
        return 0

    started = time.monotonic()
    assert start_ranks(2, main) == 7
    assert time.monotonic() - started < 20


def test_a_killed_rank_counts_as_its_signal():
    def main() -> int:
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        return 0

    assert start_ranks(2, main) == 128 + signal.SIGKILL


def test_a_signal_to_the_parent_reaches_every_rank(tmp_path):
    def main() -> int:
        signal.signal(signal.SIGTERM, lambda *_: (tmp_path / os.environ["RANK"]).touch())
        if os.environ["RANK"] == "0":
            time.sleep(0.3)
            os.kill(os.getppid(), signal.SIGTERM)
        deadline = time.monotonic() + 20
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        return 0

    assert start_ranks(2, main) == 0
    assert len(list(tmp_path.iterdir())) == 2

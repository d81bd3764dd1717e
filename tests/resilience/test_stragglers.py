"""Who is slow is told apart from noise, from other stages' work, and from what is over."""

from pathlib import Path

import pytest

from megatron_ext.resilience.config import WatchConfig
from megatron_ext.resilience.stragglers import WINDOWS, Judge, Straggler, known, record


def test_a_rank_is_named_once_after_some_windows_and_again_when_it_is_well() -> None:
    judge = Judge(factor=1.4, stages=[0, 0, 0])
    slow, clean = [0.10, 0.10, 0.20], [0.10, 0.10, 0.11]
    seen = [judge.observe(slow) for _ in range(WINDOWS + 2)]
    assert seen == [([], [])] * (WINDOWS - 1) + [([2], [])] + [([], [])] * 2
    assert judge.observe(clean) == ([], [])
    judge.observe(slow)
    seen = [judge.observe(clean) for _ in range(WINDOWS + 1)]
    assert seen == [([], [])] * (WINDOWS - 1) + [([], [2]), ([], [])]


def test_one_slow_window_among_others_names_nobody() -> None:
    judge = Judge(factor=1.4, stages=[0, 0])
    for k in range(20):
        assert judge.observe([0.1, 0.3 if k % WINDOWS else 0.1]) == ([], [])


def test_stages_do_different_work_and_are_compared_with_their_own_kind() -> None:
    judge = Judge(factor=1.4, stages=[0, 0, 1, 1])
    assert judge.ratios([0.1, 0.1, 0.4, 0.4]) == [1.0] * 4
    assert judge.ratios([0.1, 0.1, 0.4, 0.8])[3] == pytest.approx(2.0)
    assert Judge(factor=1.4, stages=[0, 1]).ratios([0.1, 0.9]) == [1.0, 1.0]


def test_a_millisecond_is_no_delay_whatever_its_ratio() -> None:
    assert Judge(factor=1.4, stages=[0, 0]).ratios([0.001, 0.002]) == [1.0, 1.0]


def test_what_is_known_of_an_attempt_leaves_out_others_and_the_recovered(tmp_path: Path) -> None:
    def found(rank: int, attempt: str, *, over: bool = False) -> Straggler:
        return Straggler(
            rank=rank, node="n1", ratio=2.0, seconds=0.1, step=9, attempt=attempt, over=over
        )

    assert known(tmp_path, attempt="b") == []
    for one in (found(0, "a"), found(1, "b"), found(2, "b"), found(1, "b", over=True)):
        record(tmp_path, one)
    with open(tmp_path / "stragglers.jsonl", "a") as file:
        file.write('{"rank": 3, "torn')
    assert [one.rank for one in known(tmp_path, attempt="b")] == [2]


@pytest.mark.parametrize(
    ("key", "value"), [("straggler_factor", 1.0), ("straggler_interval_steps", -1)]
)
def test_settings_that_mean_nothing_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"watch.{key}={value}"):
        WatchConfig(**{key: value}).check()  # type: ignore[arg-type]

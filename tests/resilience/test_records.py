"""Outcome, lease and history survive torn writes, links and two copies of a run."""

import json
import os
import signal
from pathlib import Path

import pytest

from megatron_ext import jsonl
from megatron_ext.resilience import attempts, lease, suspicions
from megatron_ext.resilience.attempts import Attempt
from megatron_ext.resilience.outcome import Outcome, read_outcome, write_outcome
from megatron_ext.resilience.stop import StopRequest, stop_file
from megatron_ext.resilience.suspicions import Suspicion
from megatron_ext.train.numerics import PassedOver


def test_the_outcome_of_another_attempt_is_no_outcome(tmp_path: Path) -> None:
    write_outcome(tmp_path, Outcome(word="finished", step=9, attempt="a"))
    assert read_outcome(tmp_path, attempt="a") == Outcome(word="finished", step=9, attempt="a")
    assert read_outcome(tmp_path, attempt="b") is None


@pytest.mark.parametrize("text", ["", "{", '{"word": "done"}', "finished", "[]", '{"x": 1}'])
def test_a_damaged_outcome_counts_as_a_crash(tmp_path: Path, text: str) -> None:
    (tmp_path / "outcome").write_text(text)
    assert read_outcome(tmp_path) is None


def test_the_later_copy_wins_and_the_earlier_one_may_not_write(tmp_path: Path) -> None:
    first, second = lease.new_attempt(), lease.new_attempt()
    lease.take(tmp_path, first)
    lease.check(tmp_path, first)
    assert lease.take(tmp_path, second) == first
    with pytest.raises(lease.LostLease):
        lease.check(tmp_path, first)
    with pytest.raises(lease.LostLease):
        lease.take(tmp_path, lease.new_attempt(), after=first)
    lease.check(tmp_path, second)


def test_a_lease_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text('{"attempt": "x"}')
    (tmp_path / "lease").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="not a plain file"):
        lease.holder(tmp_path)


def test_history_keeps_the_newest_state_of_each_attempt_past_any_torn_byte(tmp_path: Path) -> None:
    for k in range(3):
        attempts.append(tmp_path, Attempt(number=k, attempt=str(k)))
        attempts.append(tmp_path, Attempt(number=k, attempt=str(k), failure="crash", ended=1.0))
    whole = (tmp_path / "attempts.jsonl").read_bytes()
    for cut in range(0, len(whole), 17):
        (tmp_path / "attempts.jsonl").write_bytes(whole[:cut])
        attempts.append(tmp_path, Attempt(number=9, attempt="new"))
        assert attempts.history(tmp_path)[-1].attempt == "new"


RECORDS = [
    Attempt(number=0, attempt="a", nodes=["n1"], ended=1.0),
    PassedOver(phase=0, first=24, past=28, step=6, reason="loss is nan"),
    Suspicion(phase=0, first=8, step=3, rank=1, node="n2", attempt="a", fault="NaN"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_torn_line_costs_only_itself(tmp_path: Path, record: object) -> None:
    path = tmp_path / "records.jsonl"
    jsonl.append(path, record)
    whole = path.read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        jsonl.append(path, record)
        assert jsonl.read(path, type(record)) == [record] * (3 if cut == len(whole) - 1 else 2)


def test_suspicions_and_history_are_written_past_a_torn_line(tmp_path: Path) -> None:
    for name in ("attempts", "suspicions"):
        (tmp_path / f"{name}.jsonl").write_text('{"phase": 0, "fir')
    attempts.append(tmp_path, RECORDS[0])
    suspicions.record(tmp_path, RECORDS[2])
    assert attempts.history(tmp_path) == [RECORDS[0]]
    assert list(suspicions.known(tmp_path).values()) == [RECORDS[2]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"number": "1"},
        {"number": True},
        {"attempt": ["a"]},
        {"nodes": "n1"},
        {"nodes": [1]},
        {"started": "now"},
        {"ended": "5"},
        {"excluded": None},
    ],
)
def test_a_line_with_a_value_of_another_type_is_passed_over(tmp_path: Path, wrong: dict) -> None:
    attempts.append(tmp_path, Attempt(number=0, attempt="a", ended=5))
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write(json.dumps({"number": 1, "attempt": "b", **wrong}) + "\n[1]\n5\n")
    assert [a.line() for a in attempts.history(tmp_path)] == [
        "attempt 0 (local):  after 5 s, step 0 -> 0; : "
    ]


def test_history_is_private_and_follows_no_link(tmp_path: Path) -> None:
    attempts.append(tmp_path, Attempt(number=0, attempt="a"))
    assert (tmp_path / "attempts.jsonl").stat().st_mode & 0o077 == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "attempts.jsonl").symlink_to(tmp_path / "attempts.jsonl")
    with pytest.raises(OSError, match="symbolic link"):
        attempts.append(other, Attempt(number=1, attempt="b"))


def test_fields_of_a_later_version_are_passed_over_whole(tmp_path: Path) -> None:
    attempts.append(tmp_path, Attempt(number=0, attempt="a"))
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write(json.dumps({"number": 1, "attempt": "b", "colour": "blue"}) + "\n")
    assert [a.attempt for a in attempts.history(tmp_path)] == ["a"]


def test_signals_files_and_a_lost_lease_end_training_with_their_cause(tmp_path: Path) -> None:
    lease.take(tmp_path, "mine")
    request = StopRequest.install(tmp_path, attempt="mine")
    try:
        assert not request.requested()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert request.requested()
        assert request.cause == "time limit"
        stop_file(tmp_path).touch()
        request._looked = -1e9
        assert request.requested()
        assert request.cause == "asked to stop"
        lease.take(tmp_path, "theirs")
        request._looked = -1e9
        with pytest.raises(lease.LostLease):
            request.requested()
    finally:
        request.remove()

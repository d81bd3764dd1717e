"""The check C of the fault matrix: what it compares is there, and a sample too many is seen."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from megatron_ext.train.state import TrainState
from tools.drills.lab import final_state, passed_over

USUAL = {"tokens": 64, "documents": 2, "epochs": 0.5, "skipped_windows": 0, "digest": "d"}
SKIP = {"phase": 0, "first": 2, "past": 3, "step": 3, "reason": "r"}


def _run(folder, **changed):
    state = TrainState(step=4, tokens=128, samples=4, consumed={"a": dict(USUAL), "b": dict(USUAL)})
    for key, value in changed.items():
        setattr(state, key, value)
    for step in (2, 4):
        checkpoint = folder / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        text = json.dumps(asdict(state)) if step == 4 else "{}"
        (checkpoint / "state.json").write_text(text)
    return SimpleNamespace(folder=folder)


def test_the_newest_state_is_compared_whole(tmp_path):
    one, two = _run(tmp_path / "one"), _run(tmp_path / "two")
    assert final_state(one) == final_state(two)
    assert final_state(one)["consumed"]["a"] == USUAL
    more = {"a": USUAL | {"documents": 3}, "b": USUAL}
    assert final_state(_run(tmp_path / "three", consumed=more)) != final_state(one)
    with pytest.raises(OSError):
        (one.folder / "checkpoints" / "step_00000004" / "state.json").unlink()
        final_state(one)


@pytest.mark.parametrize(
    ("tokens", "windows", "wrong"),
    [(96, 1, []), (96, 0, ["0 skipped windows"]), (64, 1, ["128 tokens read"])],
)
def test_a_skip_adds_up(tmp_path, tokens, windows, wrong):
    undisturbed = final_state(_run(tmp_path / "undisturbed"))
    consumed = {"a": USUAL | {"tokens": tokens, "skipped_windows": windows}, "b": USUAL}
    run = _run(tmp_path / "run", consumed=consumed, skipped=[SKIP])
    found = passed_over(run, undisturbed)
    assert len(found) == len(wrong)
    assert all(expected in found[k] for k, expected in enumerate(wrong))

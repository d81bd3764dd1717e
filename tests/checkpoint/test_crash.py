"""A save that dies anywhere leaves the old checkpoint or the new one."""

import os
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint import shard
from megatron_ext.checkpoint.reader import TensorReader
from megatron_ext.checkpoint.rectangles import whole
from megatron_ext.checkpoint.save import PendingSave
from megatron_ext.checkpoint.shard import Slot


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """What a power loss does is not tested here, and flushing is most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def _save(folder: Path, step: int, value: float) -> Path:
    """The saver's own path from tensors to a published folder, as one rank."""
    slots = [Slot(key, (4, 4), whole((4, 4)), torch.full((4, 4), value)) for key in "ab"]
    folder.mkdir(exist_ok=True)
    pending = PendingSave(
        folders.unfinished_folder(folder, step),
        folders.step_folder(folder, step),
        slots,
        {"run.json": {}, "state.json": {"step": step}},
        {"step": step},
    )
    pending.start(background=False)
    return pending.finish()


class _Killed(BaseException):
    """Stands for the process having gone: nothing that runs after it may touch the disk."""


def _dies(folder: Path, call: int) -> bool:
    """Save step 5 anew, dying at the ``call``-th touch of the disk; False when it survives."""
    counted = 0

    def dying(function):
        def counting(*args, **kwargs):
            nonlocal counted
            counted += 1
            if counted >= call:
                raise _Killed
            return function(*args, **kwargs)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr("builtins.open", dying(open))
        patch.setattr(shard._Sink, "write", dying(shard._Sink.write))
        try:
            _save(folder, 5, value=2.0)
        except _Killed:
            return True
    return False


@pytest.mark.parametrize("present", [[4], [5], [4, 5]])
def test_a_crash_anywhere_leaves_the_old_or_the_new_one(tmp_path, present):
    outcomes = set()
    for call in range(1, 1000):
        folder = tmp_path / str(call)
        for step in present:
            _save(folder, step, value=1.0)
        died = _dies(folder, call)
        path, bad = folders.newest_good(folder)
        assert path is not None, f"nothing is left after call {call}"
        assert not bad
        values = {float(TensorReader(path).read(key).unique()) for key in "ab"}
        assert len(values) == 1
        outcomes |= values
        if not died:
            assert values == {2.0}
            break
    assert call > 30
    assert outcomes == {1.0, 2.0}


def test_a_killed_save_leaves_nothing_that_the_next_retention_does_not_clear(tmp_path):
    _save(tmp_path, 4, value=1.0)
    assert _dies(tmp_path, 20)
    assert any(entry.name.endswith(".tmp") for entry in tmp_path.iterdir())
    _save(tmp_path, 5, value=2.0)
    folders.retain(tmp_path, 2)
    left = sorted(entry.name for entry in tmp_path.iterdir())
    assert left == ["step_00000004", "step_00000005"]

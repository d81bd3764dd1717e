"""Garbage is collected at set steps and at no other time."""

import gc
from types import SimpleNamespace
from typing import Any
from unittest import mock

from megatron_ext.train.callbacks.garbage import GarbageTogether


def test_ranks_collect_at_the_same_steps_and_python_gets_it_back() -> None:
    trainer: Any = SimpleNamespace(state=SimpleNamespace(step=0))
    callback, collected = GarbageTogether(interval=3), []
    with mock.patch.object(gc, "collect", lambda: collected.append(trainer.state.step)):
        callback.before_training(trainer)
        assert not gc.isenabled()
        for step in range(1, 8):
            trainer.state.step = step
            callback.after_step(trainer, {})
        callback.after_training(trainer, "finished")
    assert gc.isenabled() and collected == [0, 3, 6]

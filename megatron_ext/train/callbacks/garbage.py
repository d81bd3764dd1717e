"""Python's cyclic garbage collection on all ranks at the same step, instead of whenever."""

import gc
from typing import TYPE_CHECKING

from megatron_ext.train.callback import Callback, Metrics

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer


class GarbageTogether(Callback):
    """Collects every ``interval`` steps: a pause of one rank would hold up all the others."""

    def __init__(self, *, interval: int) -> None:
        self._interval = interval

    def before_training(self, trainer: "Trainer") -> None:
        """From here on only this callback collects."""
        gc.disable()
        gc.collect()

    def after_step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """Collect where the interval says so."""
        if trainer.state.step % self._interval == 0:
            gc.collect()

    def after_training(self, trainer: "Trainer", outcome: str) -> None:
        """Hand collection back to Python."""
        gc.enable()

"""Tells the process outside of this rank what the rank is doing."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.parallel.waiting import waits
from megatron_ext.resilience.heartbeat import Heartbeat
from megatron_ext.train.callback import Callback, Metrics

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer


class SignsOfLife(Callback):
    """Writes the rank's section and step into a shared page: microseconds a step."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat

    def before_training(self, trainer: "Trainer") -> None:
        """Setting up and loading are over."""
        waits().shown = self._heartbeat.calls
        self._heartbeat.enter("between")

    def before_step(self, trainer: "Trainer") -> None:
        """Agreement to go on, forward, backward and update: the part whose length is learnt."""
        self._heartbeat.enter("step")

    def after_step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """Steps of one phase and one batch size do equal work."""
        regime = trainer.state.phase << 40 | int(metrics["global_batch_size"])
        self._heartbeat.step_done(trainer.state.step, regime=regime)

    def before_save(self, trainer: "Trainer") -> None:
        """A save may take as long as it needs, within its own deadline."""
        self._heartbeat.enter("save")

    def after_save(self, trainer: "Trainer", path: Path) -> None:
        """Written and verified."""
        self._heartbeat.enter("between")

    def after_training(self, trainer: "Trainer", outcome: str) -> None:
        """Taking down process groups."""
        self._heartbeat.enter("finish")

"""Validation loss of each domain, inside the loop."""

from typing import TYPE_CHECKING

from megatron_ext.config import RunConfig
from megatron_ext.evaluate.domain_loss import domain_losses
from megatron_ext.train.callback import Callback, Metrics

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer


class Evaluation(Callback):
    """Every ``evaluation.interval_steps``, and at the end of each phase."""

    def __init__(self, run: RunConfig):
        self.interval = run.evaluation.interval_steps
        self.active = bool(run.data.validation)

    def after_step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """Evaluate when due, and hand the losses to every callback."""
        due = self.interval and metrics["step"] % self.interval == 0
        phase_over = trainer.state.phase_tokens >= trainer.phase.config.tokens
        if not self.active or not (due or phase_over):
            return
        losses = domain_losses(trainer)
        for callback in trainer.callbacks:
            callback.after_evaluation(trainer, losses)

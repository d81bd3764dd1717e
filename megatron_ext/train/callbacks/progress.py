"""The line a person watches: step, loss, rate, MFU, time left."""

import logging
from typing import TYPE_CHECKING

from megatron_ext.config import RunConfig
from megatron_ext.train.callback import Callback, Metrics

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer

log = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """``3d04h``, ``2h05m``, ``3m20s`` or ``12s``."""
    whole = round(seconds)
    for size, unit, smaller, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{below}"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


class Progress(Callback):
    """Logs at INFO, which only rank 0 shows."""

    def __init__(self, run: RunConfig):
        self.interval = run.logging.progress_interval_steps

    def before_training(self, trainer: "Trainer") -> None:
        """Where the run stands and how far it goes."""
        plan, state = trainer.plan, trainer.state
        names = " -> ".join(f"{p.name} ({p.tokens:,} tokens)" for p in plan.phases)
        log.info("phases: %s", names)
        log.info("at step %d of %d, %d tokens", state.step, plan.steps, state.tokens)

    def after_step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """One line every ``logging.progress_interval_steps``."""
        if metrics["step"] % self.interval:
            return
        total = metrics["step"] + trainer.plan.steps_left(trainer.state)
        log.info(
            "%s step %d/%d loss %.4f lr %.2e grad %.3f %.0f tok/s mfu %.1f%% %.1f GiB eta %s",
            metrics["phase"],
            metrics["step"],
            total,
            metrics["loss"],
            metrics["lr"],
            metrics["grad_norm"],
            metrics["tokens_per_second"],
            100 * metrics["mfu"],
            metrics["memory_gib"],
            duration(metrics["eta_seconds"]),
        )

    def after_evaluation(self, trainer: "Trainer", losses: dict[str, float]) -> None:
        """The loss of each domain."""
        words = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        log.info("validation at step %d: %s", trainer.state.step, words)

"""The moments around a step at which something else may happen."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer

Metrics = dict[str, Any]


class Callback:
    """Every hook does nothing here; a behaviour overrides the ones it needs.

    Hooks run on every rank, in the order in which the callbacks were given, so they may take
    part in collectives as long as they do so on all ranks.
    """

    def before_training(self, trainer: "Trainer") -> None:
        """Once, after a checkpoint was loaded and before the first step."""

    def before_step(self, trainer: "Trainer") -> None:
        """Before the ranks agree to take another step, and its first micro-batch is fetched."""

    def after_step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """After the optimizer step; gradients still stand. ``metrics`` may be added to."""

    def after_evaluation(self, trainer: "Trainer", losses: dict[str, float]) -> None:
        """With the mean validation loss of each domain, in nats per token."""

    def before_save(self, trainer: "Trainer") -> None:
        """Before the state of this step is written."""

    def after_save(self, trainer: "Trainer", path: Path) -> None:
        """After a checkpoint was written and verified."""

    def after_rewind(self, trainer: "Trainer") -> None:
        """After going back to the newest checkpoint in the middle of a run."""

    def after_training(self, trainer: "Trainer", outcome: str) -> None:
        """Once, with ``finished`` or ``stopped``."""

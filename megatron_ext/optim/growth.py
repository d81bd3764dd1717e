"""Batch growth whenever the loss plateaus, as Yi-9B grew its batch (arXiv:2403.04652).

The report gives the rule and the first batch (4M tokens); test, patience and steps are ours. The
state is plain JSON and ``observe`` uses nothing else, so a resumed run decides as the whole one.
"""

import logging
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_ext.train.config import PlateauGrowth

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PlateauState:
    """What the growth has seen and decided in one phase."""

    global_batch_size: int
    """Sequences of the next step."""

    unit: int
    """The phase's first batch: grown ones are multiples of it, so they divide as it does."""

    smoothed: float | None = None
    """Exponential mean of the losses since the batch last grew."""

    best: float | None = None
    """Smoothed loss at the last improvement."""

    waited: int = 0
    """Steps since that improvement."""

    window: list[float] = field(default_factory=list)
    """Smoothed losses of the last ``patience_steps`` steps, kept by the ``slope`` test."""

    decisions: list[dict[str, Any]] = field(default_factory=list)
    """Every growth: step, batch before and after, smoothed loss."""

    @classmethod
    def start(
        cls, global_batch_size: int, *, before: dict[str, Any] | None = None
    ) -> "PlateauState":
        """The state in which a phase begins; it keeps the batch that ``before`` had grown to."""
        grown = before["global_batch_size"] if before else 0
        return cls(global_batch_size=max(global_batch_size, grown), unit=global_batch_size)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "PlateauState":
        """The exact inverse of ``as_dict``."""
        return cls(**stored)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def observe(self, loss: float, growth: PlateauGrowth, *, step: int) -> bool:
        """Take in the loss of a finished step; whether the batch grew because of it.

        A step without a finite loss teaches nothing and is passed over.
        """
        if self.global_batch_size >= growth.max_global_batch_size or not math.isfinite(loss):
            return False
        self._smooth(loss, growth.smoothing_steps)
        plateau = self._slope(growth) if growth.test == "slope" else self._best(growth)
        if plateau:
            self._grow(growth, step)
        return plateau

    def _smooth(self, loss: float, steps: int) -> None:
        """Exponential mean with the span of ``steps``; it starts at the first loss."""
        weight = 2 / (steps + 1)
        before = loss if self.smoothed is None else self.smoothed
        self.smoothed = before + weight * (loss - before)

    def _best(self, growth: PlateauGrowth) -> bool:
        """Whether ``patience_steps`` passed without a fall by ``threshold`` below the best."""
        assert self.smoothed is not None
        if self.best is None or self.smoothed < self.best * (1 - growth.threshold):
            self.best, self.waited = self.smoothed, 0
        else:
            self.waited += 1
        return self.waited >= growth.patience_steps

    def _slope(self, growth: PlateauGrowth) -> bool:
        """Whether the loss fell by less than ``threshold`` over the last ``patience_steps``."""
        assert self.smoothed is not None
        self.window.append(self.smoothed)
        if len(self.window) <= growth.patience_steps:
            return False
        oldest = self.window.pop(0)
        return self.smoothed > oldest * (1 - growth.threshold)

    def _grow(self, growth: PlateauGrowth, step: int) -> None:
        before = self.global_batch_size
        wanted = round(before * growth.factor / self.unit) * self.unit
        self.global_batch_size = min(max(wanted, before + self.unit), growth.max_global_batch_size)
        decision = {
            "step": step,
            "before": before,
            "after": self.global_batch_size,
            "smoothed_loss": self.smoothed,
        }
        self.decisions.append(decision)
        log.info(
            "step %d: the loss stays at %.4f, so the batch grows from %d to %d sequences",
            step,
            self.smoothed,
            before,
            self.global_batch_size,
        )
        self.smoothed, self.best, self.waited, self.window = None, None, 0, []

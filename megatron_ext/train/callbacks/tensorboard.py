"""The run's curves in TensorBoard, as one curve over all restarts."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.config import RunConfig
from megatron_ext.train.callback import Callback, Metrics

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer

SCALARS = (
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "memory_gib",
    "global_batch_size",
    "seq_length",
)
SOMETIMES = ("slowest_rank", "slowest_ratio")
COUNTS = ("tokens", "documents", "epochs", "skipped_windows")

HELD_SECONDS = 1.0
"""Records are handed over together: each time wakes the writer's thread, for 0.1 ms."""


class TensorBoard(Callback):
    """Rank 0 writes ``RUN_DIR/tensorboard``; steps that a resume repeats are purged."""

    def __init__(self, run: RunConfig):
        self.folder = Path(run.folder()) / "tensorboard"
        self.interval = run.logging.interval_steps
        self.writer: Any = None
        self.held: list[tuple[Any, int, float]] = []
        self.handed_over = 0.0

    def before_training(self, trainer: "Trainer") -> None:
        """Open the log at the step where the run stands."""
        if trainer.env.rank:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=trainer.state.step + 1)

    def after_step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """Scalars of the step."""
        step = metrics["step"]
        if self.writer is None or step % self.interval:
            return
        shares = metrics.get("gradient_share", {})
        values = {name: metrics[name] for name in (*SCALARS, *SOMETIMES) if name in metrics}
        self._add({f"train/{name}": value for name, value in values.items()}, step)
        if shares:
            self._add({f"gradient_share/{name}": share for name, share in shares.items()}, step)

    def after_evaluation(self, trainer: "Trainer", losses: dict[str, float]) -> None:
        """One curve a domain."""
        if self.writer is None:
            return
        step = trainer.state.step
        self._add({f"validation/{domain}": loss for domain, loss in losses.items()}, step)
        self._book(trainer)

    def after_save(self, trainer: "Trainer", path: Path) -> None:
        """What each source has given: also in a run that validates on nothing."""
        if self.writer is not None:
            self._book(trainer)

    def _book(self, trainer: "Trainer") -> None:
        ledger = trainer.ledger()
        booked = {f"ledger_{c}/{s}": line[c] for s, line in ledger.items() for c in COUNTS}
        self._add(booked, trainer.state.step)
        self._hand_over()
        self.writer.flush()

    def _add(self, values: dict[str, float], step: int) -> None:
        """All values in one record: ``add_scalar`` costs 0.1 ms for each."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        now = time.time()
        self.held.append((Summary(value=scalars), step, now))
        if now - self.handed_over >= HELD_SECONDS:
            self.handed_over = now
            self._hand_over()

    def _hand_over(self) -> None:
        for summary, step, moment in self.held:
            self.writer.file_writer.add_summary(summary, step, moment)
        self.held.clear()

    def after_training(self, trainer: "Trainer", outcome: str) -> None:
        """Flush what is left."""
        if self.writer:
            self._hand_over()
            self.writer.close()

"""The run's curves in TensorBoard, as one curve over all restarts."""

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


class TensorBoard(Callback):
    """Rank 0 writes ``RUN_DIR/tensorboard``; steps that a resume repeats are purged."""

    def __init__(self, run: RunConfig):
        self.folder = Path(run.folder()) / "tensorboard"
        self.interval = run.logging.interval_steps
        self.writer: Any = None

    def before_training(self, trainer: "Trainer") -> None:
        """Open the log at the step where the run stands."""
        if trainer.env.rank:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=trainer.state.step + 1)

    def after_step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """Scalars of the step, and what each source gave so far."""
        step = metrics["step"]
        if self.writer is None or step % self.interval:
            return
        for name in SCALARS:
            self.writer.add_scalar(f"train/{name}", metrics[name], step)
        for layer, share in metrics.get("gradient_share", {}).items():
            self.writer.add_scalar(f"gradient_share/{layer}", share, step)

    def after_evaluation(self, trainer: "Trainer", losses: dict[str, float]) -> None:
        """One curve a domain, and what each source has given."""
        if self.writer is None:
            return
        for domain, loss in losses.items():
            self.writer.add_scalar(f"validation/{domain}", loss, trainer.state.step)
        for source, booked in trainer.ledger().items():
            self.writer.add_scalar(f"ledger/{source}", booked["tokens"], trainer.state.step)
        self.writer.flush()

    def after_training(self, trainer: "Trainer", outcome: str) -> None:
        """Flush what is left."""
        if self.writer:
            self.writer.close()

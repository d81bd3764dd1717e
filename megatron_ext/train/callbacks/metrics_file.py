"""metrics.jsonl: every number of a run, one line a step, one curve over all restarts."""

import json
from pathlib import Path
from typing import IO, TYPE_CHECKING

from megatron_ext import atomic
from megatron_ext.config import RunConfig
from megatron_ext.train.callback import Callback, Metrics
from megatron_ext.train.read_metrics import read

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer


class MetricsFile(Callback):
    """Rank 0 appends to ``RUN_DIR/metrics.jsonl``.

    After a resume from step n, lines of later steps are cut: those steps are taken again.
    """

    def __init__(self, run: RunConfig):
        self.path = Path(run.folder()) / "metrics.jsonl"
        self.interval = run.logging.interval_steps
        self.file: IO[str] | None = None

    def before_training(self, trainer: "Trainer") -> None:
        """Cut what a resume will write again."""
        if trainer.env.rank:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read(self.path) if r["step"] <= trainer.state.step]
        atomic.write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self.file = self.path.open("a", buffering=1)

    def after_rewind(self, trainer: "Trainer") -> None:
        """Steps after the checkpoint are taken again, on other text."""
        if self.file:
            self.file.close()
        self.before_training(trainer)

    def after_step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """One line every ``logging.interval_steps``."""
        if self.file and metrics["step"] % self.interval == 0:
            self.file.write(json.dumps(metrics) + "\n")

    def after_evaluation(self, trainer: "Trainer", losses: dict[str, float]) -> None:
        """One line with the loss of each domain."""
        if self.file:
            state = trainer.state
            line = {"step": state.step, "tokens": state.tokens, "validation": losses}
            self.file.write(json.dumps(line) + "\n")

    def after_training(self, trainer: "Trainer", outcome: str) -> None:
        """Close the file."""
        if self.file:
            self.file.close()

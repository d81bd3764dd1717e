"""When the trainer saves, which checkpoint it starts from, and what it says about it."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_ext.checkpoint import folder as checkpoints
from megatron_ext.checkpoint.load import load
from megatron_ext.checkpoint.save import AsyncSave, save
from megatron_ext.config import RunConfig
from megatron_ext.train.state import TrainState

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Every rank calls every method."""

    def __init__(self, run: RunConfig):
        self.run = run
        self.folder = Path(run.folder()) / "checkpoints"
        self.saved_step = 0
        self._pending: AsyncSave | None = None

    def resume(self, trainer: "Trainer") -> None:
        """Load the newest good checkpoint of this run, else ``checkpoint.load``, else nothing."""
        path, broken = checkpoints.newest_good(self.folder)
        for bad, why in broken:
            log.warning("skipping broken checkpoint %s: %s", bad, why)
        if path is not None:
            self._load(trainer, path, optimizer=True)
            self.saved_step = trainer.state.step
        elif self.run.checkpoint.load:
            self._load(
                trainer,
                Path(self.run.checkpoint.load),
                optimizer=self.run.checkpoint.load_optimizer,
            )
            # Another run's weights: this run's own phases begin at their beginning.
            trainer.state = TrainState(ledger=trainer.state.ledger)
        else:
            log.info("starting from fresh weights")

    def _load(self, trainer: "Trainer", path: Path, *, optimizer: bool) -> None:
        state = load(
            path,
            run=self.run,
            chunks=trainer.model,
            optimizer=trainer.optimizer if optimizer else None,
            groups=trainer.groups,
        )
        trainer.state = TrainState.from_dict(state)
        log.info("loaded %s: step %d, %d tokens", path, trainer.state.step, trainer.state.tokens)

    def save(self, trainer: "Trainer", *, keep: bool = False) -> Path | None:
        """Write the present step; None when it is saved already."""
        step = trainer.state.step
        if step == self.saved_step:
            return None
        self.finish()
        path = save(
            self.folder,
            run=self.run,
            chunks=trainer.model,
            optimizer=trainer.optimizer,
            state=trainer.state.as_dict(),
            groups=trainer.groups,
            asynchronous=self.run.checkpoint.asynchronous,
            permanent=keep,
        )
        self.saved_step = step
        self._retain()
        return path

    def _retain(self) -> None:
        if torch.distributed.get_rank() == 0:
            checkpoints.retain(self.folder, keep=self.run.checkpoint.keep)
        torch.distributed.barrier()

    def finish(self) -> None:
        """Wait for a save that is still being written."""

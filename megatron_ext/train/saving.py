"""When the trainer saves, which checkpoint it starts from, and what it says about it."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpoint.diff import refuse
from megatron_ext.checkpoint.load import load
from megatron_ext.checkpoint.resumable import as_plain, differences, stored_run
from megatron_ext.checkpoint.save import PendingSave, Staging, begin
from megatron_ext.checkpoint.shelf import Shelf
from megatron_ext.config import RunConfig
from megatron_ext.data.ledger import tokens_of
from megatron_ext.train.state import TrainState

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Every rank calls every method."""

    def __init__(self, run: RunConfig, *, about: dict[str, Any]):
        self.run, self.about = run, about
        self.shelf = Shelf(Path(run.folder()) / "checkpoints", keep=run.checkpoint.keep)
        self.saved_step = 0
        self._staging = Staging() if run.checkpoint.asynchronous else None
        self._pending: PendingSave | None = None

    def resume(self, trainer: "Trainer") -> None:
        """Load the newest good checkpoint of this run, else ``checkpoint.load``, else nothing.

        Raises:
            ValueError: the checkpoint is of another model or text than this run asks for.
        """
        path, broken = self.shelf.newest_good()
        for bad, why in broken:
            log.warning("skipping broken checkpoint %s: %s", bad, why)
        wanted = self.run.checkpoint
        if path is not None:
            self._report_changes(path, resuming=True)
            trainer.state = self._load(trainer, path, optimizer=True, verified=True)
            if changes_feeding(stored_run(path), self.run, trainer.state.phase):
                trainer.state.rebase()
            self.saved_step = trainer.state.step
        elif wanted.load:
            self._report_changes(Path(wanted.load), resuming=False)
            parent = self._load(
                trainer, Path(wanted.load), optimizer=wanted.load_optimizer, verified=False
            )
            # Another run's weights, this run's own phases; text that is consumed stays so.
            trainer.state = TrainState(ledger=parent.consumed or parent.ledger)
        else:
            log.info("starting from fresh weights")

    def _report_changes(self, path: Path, *, resuming: bool) -> None:
        """Say what differs from the stored configuration; refuse what cannot be.

        A run that starts from another one's weights has phases and text of its own, so only
        a different model is refused, and that by loading itself.
        """
        found = differences(path, self.run, resuming=resuming)
        for difference in found:
            log.info("changed: %s", difference)
        if resuming:
            refuse(found)

    def _load(
        self, trainer: "Trainer", path: Path, *, optimizer: bool, verified: bool
    ) -> TrainState:
        stored = load(
            path,
            run=self.run,
            chunks=trainer.model,
            optimizer=trainer.optimizer,
            groups=trainer.groups,
            load_optimizer=optimizer,
            verified=verified,
            about=self.about,
        )
        state = TrainState.from_dict(stored)
        log.info("loaded %s: step %d, %d tokens", path, state.step, state.tokens)
        return state

    def save(self, trainer: "Trainer", *, pinned: bool = False) -> Path | None:
        """Write the present step; the path once it is whole, None where there is nothing to do.

        With ``checkpoint.asynchronous`` the path is returned by a later ``poll`` or ``finish``.
        """
        state = trainer.state
        if state.step == self.saved_step:
            return None
        self.finish()
        self.saved_step = state.step
        stored = dataclasses.replace(state, consumed=trainer.ledger())
        self._pending = begin(
            self.shelf.folder,
            run=self.run,
            chunks=trainer.model,
            optimizer=trainer.optimizer,
            state=stored.as_dict(),
            groups=trainer.groups,
            about=self.about,
            pinned=pinned,
            staging=self._staging,
        )
        return None if self._staging else self.finish()

    def poll(self) -> Path | None:
        """The checkpoint that was written in the background, once it is whole on all ranks."""
        if self._pending is None or (path := self._pending.poll()) is None:
            return None
        return self._shelve(path)

    def finish(self) -> Path | None:
        """Wait for a save that is under way; the path of what it wrote."""
        return None if self._pending is None else self._shelve(self._pending.finish())

    def _shelve(self, path: Path) -> Path:
        self._pending = None
        self.shelf.added(path, read_back=self._staging is not None)
        log.info("saved %s", path)
        return path


def changes_feeding(stored: dict[str, Any], run: RunConfig, phase: int) -> bool:
    """Whether the running phase would now draw other windows than the stored run did.

    Batch and world size do not matter: samples are numbered over the job.
    """
    if phase >= len(run.phases) or phase >= len(stored["phases"]):
        return False
    return _feeding(stored, phase) != _feeding(as_plain(run), phase)


def _feeding(config: dict[str, Any], phase: int) -> list[Any]:
    own = config["phases"][phase]
    shares = [own[k] for k in ("tokens", "mixture", "mixture_end", "ramp_power")]
    length = own["seq_length"] or config["batch"]["seq_length"]
    return [length, list(config["data"]["sources"]), *shares]


def numbering(run: RunConfig, state: TrainState) -> str:
    """A name for what the running phase's samples are counted over: what they are drawn from, how,
    and where in it the count began. Numbers of two names do not compare."""
    start = {name: tokens_of(state.ledger, name) for name in run.data.sources}
    parts = [run.seed, state.anchor_tokens, start, _feeding(as_plain(run), state.phase)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

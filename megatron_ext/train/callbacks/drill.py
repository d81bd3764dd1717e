"""Strikes the faults of ``watch.drill``: each at its rank and step, and only so often."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.config import RunConfig
from megatron_ext.parallel.env import own_host
from megatron_ext.resilience.drill import FAULTS, LASTING, NUMERIC, DrillConfig
from megatron_ext.train.callback import Callback

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer


class Drill(Callback):
    """What has been struck is kept in RUN_DIR/drill, so that a restart does not meet it again."""

    def __init__(self, run: RunConfig) -> None:
        self._folder = Path(run.folder()) / "drill"
        self._planned = list(enumerate(run.watch.drill))
        self._hooks: list[Any] = []
        self._lasting: list[str] = []

    def before_step(self, trainer: "Trainer") -> None:
        """Strike what is due."""
        for fault in self._due(trainer, {*FAULTS, *NUMERIC, *LASTING}):
            self._strike(trainer, fault)
        for kind in self._lasting:
            LASTING[kind]()

    def _due(self, trainer: "Trainer", kinds: set[str]) -> Iterator[DrillConfig]:
        for index, fault in self._planned:
            due = trainer.state.step == fault.step and self._here(index, fault, trainer.env.rank)
            if due and fault.kind in kinds and self._count(index, fault):
                yield fault

    def _here(self, index: int, fault: DrillConfig, rank: int) -> bool:
        if fault.kind != "nan_on_node":
            return rank == fault.rank
        node = self._folder / f"node-{index}"
        if rank == fault.rank and not node.exists():
            self._folder.mkdir(exist_ok=True)
            node.write_text(own_host())
        return node.exists() and node.read_text() == own_host()

    def _count(self, index: int, fault: DrillConfig) -> bool:
        self._folder.mkdir(exist_ok=True)
        struck = len(list(self._folder.glob(f"{index}-*")))
        if fault.times and struck >= fault.times:
            return False
        (self._folder / f"{index}-{struck}").touch()
        return True

    def _strike(self, trainer: "Trainer", fault: DrillConfig) -> None:
        if fault.kind in FAULTS:
            FAULTS[fault.kind]()
            return
        if fault.kind in LASTING:
            self._lasting.append(fault.kind)
            return
        parameter = next(p for p in trainer.model[0].parameters() if p.requires_grad)
        if fault.kind in ("flip", "ulp"):
            # The first or the last bit of one weight, as a cosmic ray would: nothing reports it.
            with torch.no_grad():
                weight = parameter.view(-1)[:1]
                next_up = torch.nextafter(weight, torch.full_like(weight, torch.inf))
                weight.copy_(-weight if fault.kind == "flip" else next_up)
            return
        fired: list[bool] = []
        place = trainer.state.phase_samples

        def now() -> bool:
            here = trainer.state.phase_samples == place
            here = here and (not fired or fault.kind.endswith(("_stays", "_on_node")))
            fired.append(True)
            return here

        if fault.kind.startswith("spike"):
            # A thousand times the loss of one micro-batch, which is one of many in the mean.
            hook = trainer.model[0].register_forward_hook(
                lambda _module, _given, loss: loss * 1000 if now() else loss
            )
        else:
            by = 1e6 if fault.kind.startswith("steep") else float("nan")
            hook = parameter.register_hook(lambda g: g * by if now() else g)
        self._hooks.append(hook)

    def before_save(self, trainer: "Trainer") -> None:
        """The fault that waits for a file."""
        for _ in self._due(trainer, {"kill_in_save"}):
            folder = trainer.checkpoints.shelf.folder
            threading.Thread(target=_die_at_first_byte, args=(folder,), daemon=True).start()

    def after_training(self, trainer: "Trainer", outcome: str) -> None:
        """The fault of a rank that does not leave."""
        for _ in self._due(trainer, {"linger"}):
            FAULTS["sleep"]()

    def after_step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        """A numeric fault lasts one step."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _die_at_first_byte(folder: Path) -> None:
    while not any(folder.glob(".step_*.tmp/*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

"""Strikes the faults of ``watch.drill``: each at its rank and step, and only so often."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.config import RunConfig
from megatron_ext.resilience.drill import FAULTS, LASTING, DrillConfig
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
        for index, fault in self._planned:
            due = (fault.rank, fault.step) == (trainer.env.rank, trainer.state.step)
            if due and self._count(index, fault):
                self._strike(trainer, fault)
        for kind in self._lasting:
            LASTING[kind]()

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
        if fault.kind == "flip":
            # The sign bit of one weight, as a cosmic ray would: nothing reports it.
            with torch.no_grad():
                parameter.view(-1)[0].neg_()
            return
        fired: list[bool] = []
        place = trainer.state.phase_samples

        def poison(gradient: torch.Tensor) -> torch.Tensor:
            if (fired and fault.kind == "nan") or trainer.state.phase_samples != place:
                return gradient
            fired.append(True)
            return gradient * float("nan")

        self._hooks.append(parameter.register_hook(poison))

    def after_step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        """A numeric fault lasts one step."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

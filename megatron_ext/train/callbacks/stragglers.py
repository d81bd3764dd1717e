"""Names the ranks that hold the others up: in the log, the metrics and RUN_DIR/stragglers.jsonl."""

import logging
import statistics
from typing import TYPE_CHECKING

import torch

from megatron_ext.parallel.gather import of_every_rank
from megatron_ext.parallel.hosts import host_of_ranks
from megatron_ext.resilience.config import WatchConfig
from megatron_ext.resilience.stragglers import Judge, Straggler, forget, record
from megatron_ext.train.callback import Callback, Metrics
from megatron_ext.train.own_time import own_time

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer

log = logging.getLogger(__name__)


class Stragglers(Callback):
    """Measures every step; compares every ``watch.straggler_interval_steps``, by one small gather.

    Adds ``slowest_rank`` and ``slowest_ratio`` to the metrics of these steps. Must stand before
    every other callback of the trainer, so that their work before a step counts as the rank's
    own; the watcher's sign of life comes first.
    """

    def __init__(self, watch: WatchConfig) -> None:
        self._interval, self._factor = watch.straggler_interval_steps, watch.straggler_factor
        self._seconds: list[float] = []

    def before_training(self, trainer: "Trainer") -> None:
        """Learn who sits where; every rank takes part."""
        self._place = next(trainer.model[0].parameters()).device
        self._own = own_time(trainer.model)
        self._nodes = host_of_ranks(self._place)
        stages = self._gather(trainer.groups.pp.rank())
        if trainer.env.rank == 0 and not trainer.env.attempt:
            forget(trainer.run_dir)  # without attempts, nothing tells an old report from a new one
        self._judge = Judge(factor=self._factor, stages=[int(stage) for stage in stages])

    def _gather(self, mine: float) -> list[float]:
        """``mine`` of every rank."""
        here = torch.tensor([mine], dtype=torch.float64, device=self._place)
        return torch.cat(of_every_rank(here)).tolist()

    def before_step(self, trainer: "Trainer") -> None:
        """The step's own time begins."""
        self._own.start()

    def after_step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """It ends; every so often all ranks compare."""
        self._seconds.append(self._own.stop())
        if trainer.state.step % self._interval:
            return
        seconds = self._gather(statistics.median(self._seconds))
        self._seconds.clear()
        ratios = self._judge.ratios(seconds)
        metrics["slowest_rank"] = max(range(len(ratios)), key=ratios.__getitem__)
        metrics["slowest_ratio"] = max(ratios)
        turned, recovered = self._judge.observe(seconds)
        for rank in [*turned, *recovered] if trainer.env.rank == 0 else ():
            found = Straggler(
                rank=rank,
                node=self._nodes[rank],
                ratio=ratios[rank],
                seconds=seconds[rank],
                step=trainer.state.step,
                attempt=trainer.env.attempt,
                over=rank in recovered,
            )
            log.warning("%s", found.line())
            record(trainer.run_dir, found)

    def after_rewind(self, trainer: "Trainer") -> None:
        """Steps of before are not to be compared with those that follow."""
        self._seconds.clear()

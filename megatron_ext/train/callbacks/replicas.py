"""Silent corruption: data-parallel replicas must hold the same weights, bit for bit."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_ext.parallel.gather import of_every_rank
from megatron_ext.resilience.config import WatchConfig
from megatron_ext.train.callback import Callback, Metrics

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer


class ReplicasDiffer(RuntimeError):
    """Two replicas hold different weights. The newest checkpoint was checked: go back to it."""


class Replicas(Callback):
    """Compares a checksum over replicas every so many steps, and before every save.

    A flipped bit in one rank's weights changes no loss at once and no error is raised; what it
    spoils is found within the interval, and never reaches a checkpoint.
    """

    def __init__(self, watch: WatchConfig) -> None:
        self._interval = watch.replica_interval_steps

    def after_step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """Every ``watch.replica_interval_steps``."""
        if trainer.state.step % self._interval == 0:
            compare(trainer)

    def before_save(self, trainer: "Trainer") -> None:
        """No checkpoint is written from replicas that differ."""
        compare(trainer)


def compare(trainer: "Trainer") -> None:
    """Every rank must call this.

    Raises:
        ReplicasDiffer: on every rank of a group that differs, naming the ranks in the minority.
    """
    group = trainer.groups.dp_cp
    if group.size() < 2:
        return
    sums = [int(value) for value in of_every_rank(checksum(trainer.model), group=group)]
    if len(set(sums)) > 1:
        usual = max(set(sums), key=sums.count)
        ranks = dist.get_process_group_ranks(group)
        odd = [rank for rank, value in zip(ranks, sums) if value != usual]
        raise ReplicasDiffer(
            f"replica checksums differ at step {trainer.state.step}: rank "
            f"{', '.join(map(str, odd))} of {', '.join(map(str, ranks))}"
        )


def checksum(chunks: list[Any]) -> torch.Tensor:
    """A sum over the bits of all weights, in which every flipped bit shows."""
    total = torch.zeros(1, dtype=torch.int64, device=next(chunks[0].parameters()).device)
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    for number, parameter in enumerate(p for chunk in chunks for p in chunk.parameters()):
        bits = parameter.detach().contiguous().view(whole[parameter.element_size()])
        total += bits.sum(dtype=torch.int64) * (2 * number + 1)
    return total

"""From a sample number to this rank's micro-batches, phase by phase."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_ext.config import RunConfig
from megatron_ext.data.batches import PhaseBatches
from megatron_ext.train.phases import Phase
from megatron_ext.train.state import TrainState
from megatron_ext.train.step import Batch


class Feed:
    """Samples of the running phase, for one data-parallel rank.

    The samples of a step are numbered over the whole job, so neither the world size nor a
    restart changes which text a step sees.
    """

    def __init__(
        self,
        run: RunConfig,
        open_phase: Callable[[Phase, dict[str, Any]], PhaseBatches],
        *,
        data_parallel_rank: int,
        data_parallel_size: int,
    ):
        self.micro_batch_size = run.batch.micro_batch_size
        self.rank = data_parallel_rank
        self.size = data_parallel_size
        self._open_phase = open_phase
        self._index = -1
        self._batches: PhaseBatches

    def phase(self, phase: Phase, state: TrainState) -> PhaseBatches:
        """The samples of ``phase``, opened at the ledger with which it began."""
        if self._index != phase.index:
            self._batches = self._open_phase(phase, state.ledger)
            self._index = phase.index
        return self._batches

    def step(
        self, phase: Phase, state: TrainState, *, global_batch_size: int
    ) -> Callable[[], Iterator[Batch]]:
        """Makes iterators over this rank's micro-batches of the next step."""
        samples = self.phase(phase, state)
        first = state.phase_samples
        per_pass = self.micro_batch_size * self.size

        def micro_batches() -> Iterator[Batch]:
            for start in range(first, first + global_batch_size, per_pass):
                mine = start + self.rank * self.micro_batch_size
                yield samples.micro_batch(range(mine, mine + self.micro_batch_size))

        return micro_batches


def on_device(batch: Batch, device: torch.device) -> Batch:
    """``batch`` where the model is."""
    return {k: v.to(device, non_blocking=True) for k, v in batch.items() if v is not None}

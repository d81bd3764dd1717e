"""From a sample number to this rank's micro-batches, phase by phase."""

from collections.abc import Callable, Iterator, Mapping

import torch

from megatron_ext.config import RunConfig
from megatron_ext.data.indexed import IndexedCorpus
from megatron_ext.parallel.context import own_slice
from megatron_ext.train.phases import Phase
from megatron_ext.train.sources import Samples, open_phase
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
        sources: dict[str, IndexedCorpus],
        *,
        place: torch.device,
        data_parallel_rank: int,
        data_parallel_size: int,
        context: tuple[int, int] = (0, 1),
    ):
        self.micro_batch_size = run.batch.micro_batch_size
        self.rank = data_parallel_rank
        self.size = data_parallel_size
        self.run, self.sources = run, sources
        self.device = place
        self.context = context
        """Rank and size of the context-parallel group, whose ranks share each sequence."""

        self._opened: tuple[object, ...] = ()
        self._samples: Samples

    def phase(self, phase: Phase, state: TrainState) -> Samples:
        """The samples of ``phase``, opened at the ledger with which it began."""
        windows = tuple((s["phase"], s["first"], s["past"]) for s in state.skipped)
        key = (phase.index, state.numbering, windows)
        if self._opened != key:
            self._samples = open_phase(self.run, phase, self.sources, state)
            self._opened = key
        return self._samples

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
                numbers = range(mine, mine + self.micro_batch_size)
                batch = samples.micro_batch(numbers)
                check_ids(batch, numbers, vocab_size=self.run.model.vocab_size)
                yield on_device(batch, self.device, context=self.context)

        return micro_batches


def check_ids(batch: Mapping[str, torch.Tensor | None], numbers: range, *, vocab_size: int) -> None:
    """Refuse tokens that the model has no row for. On GPUs nobody would say which they were.

    Raises:
        ValueError: naming the token and the samples.
    """
    for name in ("tokens", "labels"):
        ids = batch[name]
        assert ids is not None
        if (largest := int(ids.max())) >= vocab_size:
            raise ValueError(
                f"samples {numbers.start} to {numbers.stop - 1} hold token {largest} outside the "
                f"vocabulary of model.vocab_size={vocab_size}: the text was prepared with another "
                f"tokenizer."
            )


def on_device(
    batch: Mapping[str, torch.Tensor | None],
    place: torch.device,
    *,
    context: tuple[int, int] = (0, 1),
) -> Batch:
    """This rank's part of ``batch`` where the model is.

    Packed documents are laid end to end: ``[1, b * s]``.
    """
    there = {k: v for k, v in batch.items() if v is not None}
    mine = own_slice(there, rank=context[0], size=context[1])
    moved = {k: v.to(place, non_blocking=True) for k, v in mine.items()}
    if "cu_seqlens" not in moved:
        return moved
    return {k: v if k == "cu_seqlens" else v.reshape(1, -1) for k, v in moved.items()}

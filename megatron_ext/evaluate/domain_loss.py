"""Mean validation loss of each domain, over fixed windows, whatever the parallel layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from megatron_ext.train.feed import on_device
from megatron_ext.train.step import Batch, run_schedule

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer


@contextmanager
def evaluating(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Eval mode without gradients, and back to training."""
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk in chunks:
            chunk.train()


def domain_losses(trainer: "Trainer") -> dict[str, float]:
    """Nats per token of each source of ``data.validation``; every rank must call this.

    The same windows are scored at every call: the first ``evaluation.tokens_per_domain`` tokens
    in the order of the file, fewer where a domain has less.
    """
    with evaluating(trainer.model):
        return {name: _loss(trainer, name) for name in sorted(trainer.validation)}


def _loss(trainer: "Trainer", name: str) -> float:
    text = trainer.validation[name]
    feed = trainer.feed
    # Every rank runs the same number of passes; windows past the end count no tokens.
    passes = -(-text.num_samples // (feed.micro_batch_size * feed.size))
    passes += -passes % (trainer.groups.pp.size() if len(trainer.model) > 1 else 1)

    def batches() -> Iterator[Batch]:
        for number in range(passes):
            first = (number * feed.size + feed.rank) * feed.micro_batch_size
            batch = text.micro_batch(range(first, first + feed.micro_batch_size))
            yield on_device(batch, feed.device, context=feed.context)

    total, count = run_schedule(
        trainer.model,
        batches,
        num_microbatches=passes,
        micro_batch_size=feed.micro_batch_size,
        seq_length=text.seq_length,
        forward_only=True,
        groups=trainer.groups,
    )
    return total / max(count, 1)

"""A validation corpus cut into windows in its own order, each token predicted once."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from megatron_ext.data.batches import collate
from megatron_ext.data.indexed import IndexedCorpus

if TYPE_CHECKING:
    import torch


class HeldOut:
    """The first ``tokens`` tokens of a corpus as windows of ``seq_length``."""

    def __init__(
        self, corpus: IndexedCorpus, *, seq_length: int, tokens: int, packing: str = "crossdoc"
    ) -> None:
        self.corpus, self.seq_length, self.packing = corpus, seq_length, packing
        self.scored = max(min(tokens, corpus.num_tokens - 1), 0)
        """Tokens that are predicted: the first of the corpus has nothing before it."""
        self.num_samples = -(-self.scored // seq_length)
        self._ends = np.cumsum(corpus.lengths, dtype=np.int64)
        self._whole = np.array_equal(corpus.starts, self._ends - corpus.lengths)
        assert self._whole, "tools.prepare writes documents end to end"

    def micro_batch(self, ks: Iterable[int]) -> dict[str, "torch.Tensor | None"]:
        """Windows ``ks``; one that runs past the end is filled with token 0 outside the loss.

        Numbers past the last window are allowed: ranks may be filled up with them.
        """
        numbers, size = list(ks), self.seq_length
        windows = np.zeros((len(numbers), size + 1), dtype=np.int64)
        document_ends, valid = [], []
        for row, k in zip(windows, numbers, strict=True):
            begin = k * size
            past = max(min(begin + size, self.scored) + 1, begin)
            piece = self.corpus.tokens[begin:past]
            row[: len(piece)] = piece
            first, last = np.searchsorted(self._ends, [begin, past], "right")
            document_ends.append((self._ends[first:last] - begin).tolist())
            valid.append(max(past - 1 - begin, 0))
        batch = collate(windows, document_ends, packing=self.packing)
        assert batch["loss_mask"] is not None
        batch["loss_mask"] = batch["loss_mask"].clone()
        for mask, count in zip(batch["loss_mask"], valid, strict=True):
            mask[count:] = 0.0
        return batch

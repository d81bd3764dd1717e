"""The endless, shuffled token stream of one source, addressed by token offset.

Epoch e of the stream is the corpus's documents in an order drawn from (seed, name, e). Because
any stretch of it can be read by offset alone, sequence length, batch and world size may change
anywhere without a token being repeated or left out: the next window starts where the last ended.
"""

import zlib
from pathlib import Path

import numpy as np

from megatron_ext.data.epoch import Epoch, build_epoch, load_epoch
from megatron_ext.data.indexed import IndexedCorpus

WINDOW = 16
"""Documents looked up at a time: about twice those of a sample of 4096 tokens."""


class TokenStream:
    """All epochs of ``corpus``, end to end. Two of them are held in memory at a time."""

    def __init__(
        self, corpus: IndexedCorpus, *, seed: int, name: str = "", cache: str | Path = ""
    ) -> None:
        self.corpus = corpus
        self.seed = (seed, zlib.crc32(name.encode()))
        self.cache = cache
        self._epochs: dict[int, Epoch] = {}

    def epoch(self, number: int) -> Epoch:
        """Document order of epoch ``number``, built, or taken from the cache folder."""
        found = self._epochs.get(number)
        if found is None:
            seed = (*self.seed, number)
            if self.cache:
                found = load_epoch(self.cache, self.corpus, seed=seed)
            else:
                found = build_epoch(self.corpus, seed=seed)
            while len(self._epochs) >= 2:
                self._epochs.pop(max(self._epochs, key=lambda held: abs(held - number)))
            self._epochs[number] = found
        return found

    def read(self, offset: int, out: np.ndarray) -> list[int]:
        """Fill ``out`` with the tokens from ``offset`` on; return where documents end in it.

        A document end is the position after its last token; one that falls on ``len(out)`` is
        included, so that the last piece is known to be whole.
        """
        size, total = len(out), self.corpus.num_tokens
        number, at = divmod(offset, total)
        pieces, document_ends, filled = list[np.ndarray](), list[int](), 0
        while filled < size:
            filled = self._read_epoch(self.epoch(number), at, size, filled, pieces, document_ends)
            number, at = number + 1, 0
        np.concatenate(pieces, out=out)  # one conversion of types for all documents
        return document_ends

    def _read_epoch(
        self,
        epoch: Epoch,
        at: int,
        size: int,
        filled: int,
        pieces: list[np.ndarray],
        document_ends: list[int],
    ) -> int:
        """Add pieces from ``at`` on until ``size`` are there or the epoch ends; return how many."""
        tokens, ends = self.corpus.tokens, epoch.ends
        first = int(ends.searchsorted(at, "right"))
        begin = ends.item(first - 1) if first else 0
        while filled < size and first < len(ends):
            window = slice(first, first + WINDOW)
            for end, start in zip(ends[window].tolist(), epoch.starts[window].tolist()):
                count = end - at
                source = start + at - begin
                if count > size - filled:
                    pieces.append(tokens[source : source + size - filled])
                    return size
                if count:
                    pieces.append(tokens[source : source + count])
                    filled += count
                    document_ends.append(filled)
                at = begin = end
                if filled == size:
                    return size
            first += WINDOW
        return filled

    def documents_before(self, offset: int) -> int:
        """Documents wholly read once ``offset`` tokens were, every epoch counted."""
        number, at = divmod(offset, self.corpus.num_tokens)
        whole = number * self.corpus.num_documents
        return whole + (int(self.epoch(number).ends.searchsorted(at, "right")) if at else 0)

    def epochs_before(self, offset: int) -> float:
        """How many times ``offset`` tokens are the whole corpus."""
        return offset / self.corpus.num_tokens

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
        size, tokens, total = len(out), self.corpus.tokens, self.corpus.num_tokens
        number, at = divmod(offset, total)
        filled, document_ends = 0, list[int]()
        while filled < size:
            epoch = self.epoch(number)
            first = int(epoch.ends.searchsorted(at, "right"))
            last = int(epoch.ends.searchsorted(at + size - filled, "left")) + 1
            ends, starts = epoch.ends[first:last].tolist(), epoch.starts[first:last].tolist()
            begin = int(epoch.ends[first - 1]) if first else 0
            for end, start in zip(ends, starts, strict=True):
                source = start + at - begin
                count = end - at
                if count > size - filled:
                    out[filled:] = tokens[source : source + size - filled]
                    return document_ends
                out[filled : filled + count] = tokens[source : source + count]
                filled += count
                if count:
                    document_ends.append(filled)
                at = begin = end
            number, at = number + 1, 0
        return document_ends

    def documents_before(self, offset: int) -> int:
        """Documents wholly read once ``offset`` tokens were, every epoch counted."""
        number, at = divmod(offset, self.corpus.num_tokens)
        whole = number * self.corpus.num_documents
        return whole + (int(self.epoch(number).ends.searchsorted(at, "right")) if at else 0)

    def epochs_before(self, offset: int) -> float:
        """How many times ``offset`` tokens are the whole corpus."""
        return offset / self.corpus.num_tokens

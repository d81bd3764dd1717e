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
from megatron_ext.jit import compiled


def copy_documents(
    tokens: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    at: int,
    out: np.ndarray,
    marks: np.ndarray,
) -> tuple[int, int]:
    """Fill ``out`` from token ``at`` of an epoch on, ``marks`` with where documents end in it.

    Returns:
        How many tokens and how many marks: fewer tokens than ``out`` where the epoch ends.
    """
    first, past = 0, len(ends)
    while first < past:  # of the documents that end behind ``at``, the first
        middle = (first + past) // 2
        if ends[middle] <= at:
            first = middle + 1
        else:
            past = middle
    filled, found = 0, 0
    begin = ends[first - 1] if first else 0
    while filled < len(out) and first < len(ends):
        count = min(ends[first] - at, len(out) - filled)
        source = starts[first] + at - begin
        piece, place = tokens[source : source + count], out[filled : filled + count]
        for i in range(len(place)):
            place[i] = piece[i]
        filled += count
        at += count
        if at == ends[first]:
            if count:
                marks[found] = filled
                found += 1
            begin, first = at, first + 1
    return filled, found


class TokenStream:
    """All epochs of ``corpus``, end to end. Two of them are held in memory at a time."""

    def __init__(
        self, corpus: IndexedCorpus, *, seed: int, name: str = "", cache: str | Path = ""
    ) -> None:
        self.corpus = corpus
        self.seed = (seed, zlib.crc32(name.encode()))
        self.cache = cache
        self._epochs: dict[int, Epoch] = {}
        self._marks = np.empty(0, dtype=np.int64)  # where the ends are found: kept between reads

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
        number, at = divmod(offset, self.corpus.num_tokens)
        if len(self._marks) < len(out):
            self._marks = np.empty(len(out), dtype=np.int64)
        copy, marks, tokens = compiled(copy_documents), self._marks, self.corpus.tokens
        epoch = self.epoch(number)
        filled, found = copy(tokens, epoch.starts, epoch.ends, at, out, marks)
        document_ends: list[int] = marks[:found].tolist()
        while filled < len(out):  # the epoch ended
            number += 1
            epoch = self.epoch(number)
            count, found = copy(tokens, epoch.starts, epoch.ends, 0, out[filled:], marks)
            document_ends += (marks[:found] + filled).tolist()
            filled += count
        return document_ends

    def documents_before(self, offset: int) -> int:
        """Documents wholly read once ``offset`` tokens were, every epoch counted."""
        number, at = divmod(offset, self.corpus.num_tokens)
        whole = number * self.corpus.num_documents
        return whole + (int(self.epoch(number).ends.searchsorted(at, "right")) if at else 0)

    def epochs_before(self, offset: int) -> float:
        """How many times ``offset`` tokens are the whole corpus."""
        return offset / self.corpus.num_tokens

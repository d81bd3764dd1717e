"""Samples of one phase by number, and what was consumed after any number of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_ext.data.blend import Blend
from megatron_ext.data.indexed import IndexedCorpus
from megatron_ext.data.ledger import Ledger, check_same_content, entry, tokens_of
from megatron_ext.data.stream import TokenStream

if TYPE_CHECKING:
    import torch


class Phase(Protocol):
    """What of a phase decides its samples, as in megatron_ext.train.config.PhaseConfig."""

    tokens: int
    mixture: dict[str, float]
    mixture_end: dict[str, float]
    ramp_power: float
    seq_length: int | None
    packing: str


@dataclass(frozen=True)
class Sample:
    """One window of a source's stream."""

    tokens: np.ndarray
    """int64 [seq_length + 1]: inputs are all but the last, labels all but the first."""

    document_ends: list[int]
    """Positions after the last token of each document that ends inside the window."""

    source: str


class PhaseBatches:
    """Addresses every sample of a phase by its number in it, on any rank, in any order.

    Sample k belongs to one source; it is the window of ``seq_length + 1`` tokens that begins
    ``seq_length`` tokens after that source's window before it. Neither the batch size nor the
    number of ranks enters, so both may change between any two steps.
    """

    def __init__(
        self,
        phase: Phase,
        sources: Mapping[str, IndexedCorpus],
        ledger: Mapping[str, Mapping],
        *,
        seed: int,
        cache: str | Path = "",
        skipped: Sequence[tuple[int, int]] = (),
        begun: int = 0,
    ) -> None:
        """Count samples from where the phase has read ``begun`` tokens and the ``ledger`` stands.

        ``skipped`` are ranges [first, past) of sample numbers that training jumped over after a
        loss spike: they count as consumed, and as skipped windows.

        Raises:
            ValueError: a source holds other text than the ledger counted.
        """
        assert phase.seq_length, "the phase's own sequence length is filled in by then"
        self.seq_length, self.packing = phase.seq_length, phase.packing
        self.skipped = tuple(skipped)
        self.streams = {
            name: TokenStream(corpus, seed=seed, name=name, cache=cache)
            for name, corpus in sources.items()
        }
        check_same_content(ledger, sources)
        self.start = {name: dict(line) for name, line in ledger.items()}
        mixture = phase.mixture or in_proportion(sources)
        end = phase.mixture_end or mixture
        self.names = [n for n in sources if mixture.get(n, 0.0) > 0 or end.get(n, 0.0) > 0]
        self.blend = Blend(
            normalised([mixture.get(name, 0.0) for name in self.names]),
            shares_end=normalised([end.get(name, 0.0) for name in self.names]),
            samples=phase.tokens / phase.seq_length,
            ramp_power=phase.ramp_power,
            begun=begun / phase.seq_length,
        )
        self._sources = [(n, self.streams[n], tokens_of(self.start, n)) for n in self.names]

    def read(self, k: int, out: np.ndarray) -> tuple[str, list[int]]:
        """Put sample ``k`` into ``out`` [seq_length + 1]; return its source and document ends."""
        source, before = self.blend.at(k)
        name, stream, start = self._sources[source]
        return name, stream.read(start + before * self.seq_length, out)

    def sample(self, k: int) -> Sample:
        """Sample ``k`` of the phase."""
        tokens = np.empty(self.seq_length + 1, dtype=np.int64)
        source, ends = self.read(k, tokens)
        return Sample(tokens=tokens, document_ends=ends, source=source)

    def ledger_at(self, k: int) -> Ledger:
        """What was consumed of every source once the phase's first ``k`` samples were."""
        counts = dict(zip(self.names, self.blend.counts_before(k).tolist(), strict=True))
        jumped = dict.fromkeys(self.names, 0)
        for first, past in self.skipped:
            if first < k:
                within = self.blend.counts_before(min(past, k)) - self.blend.counts_before(first)
                for name, windows in zip(self.names, within.tolist(), strict=True):
                    jumped[name] += windows
        ledger = {name: dict(line) for name, line in self.start.items()}
        for name, stream in self.streams.items():
            ledger[name] = entry(
                stream,
                tokens=tokens_of(self.start, name) + counts.get(name, 0) * self.seq_length,
                skipped_windows=int(self.start.get(name, {}).get("skipped_windows", 0))
                + jumped.get(name, 0),
            )
        return ledger

    def micro_batch(self, ks: Iterable[int]) -> dict[str, "torch.Tensor | None"]:
        """Samples ``ks`` as one micro-batch; see ``collate``."""
        numbers = list(ks)
        windows = np.empty((len(numbers), self.seq_length + 1), dtype=np.int64)
        ends = [self.read(k, windows[row])[1] for row, k in enumerate(numbers)]
        return collate(windows, ends, packing=self.packing)


def in_proportion(sources: Mapping[str, IndexedCorpus]) -> dict[str, float]:
    """Shares by the sources' sizes in tokens: each is read equally often."""
    total = sum(corpus.num_tokens for corpus in sources.values())
    return {name: corpus.num_tokens / total for name, corpus in sources.items()}


def normalised(shares: Sequence[float]) -> np.ndarray:
    """Shares over their sum, so that 0.1 * 10 written in decimals lags nowhere."""
    array = np.asarray(shares, dtype=np.float64)
    return array / array.sum()


def collate(
    windows: np.ndarray, document_ends: Sequence[Sequence[int]], *, packing: str
) -> dict[str, "torch.Tensor | None"]:
    """Windows [b, s + 1] as ``tokens``, ``labels``, ``loss_mask``, ``position_ids`` [b, s].

    With packing ``crossdoc`` attention crosses documents and every token counts. With ``document``
    positions start again at each document, the last token of a document, which would be asked for
    the first of an unrelated one, is left out of the loss, and ``cu_seqlens`` (int32) marks the
    documents of the micro-batch flattened to [1, b * s]. Mask and positions of ``crossdoc`` are
    shared between micro-batches: whoever changes them clones them first.
    """
    import torch

    batch, size = windows.shape[0], windows.shape[1] - 1
    loss_mask, position_ids = _undivided(batch, size)
    cu_seqlens = None
    if packing == "document":
        loss_mask, position_ids = loss_mask.clone(), position_ids.clone()
        marks = [0]
        for row, ends in enumerate(document_ends):
            for end in ends:
                if end <= size:
                    loss_mask[row, end - 1] = 0.0
                if end < size:
                    position_ids[row, end:] = torch.arange(size - end)
                    marks.append(row * size + end)
            marks.append((row + 1) * size)
        cu_seqlens = torch.tensor(marks, dtype=torch.int32)
    return {
        "tokens": torch.from_numpy(windows[:, :-1]).contiguous(),
        "labels": torch.from_numpy(windows[:, 1:]).contiguous(),
        "loss_mask": loss_mask,
        "position_ids": position_ids,
        "cu_seqlens": cu_seqlens,
    }


@lru_cache(maxsize=8)
def _undivided(batch: int, size: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Mask and positions of windows that nothing divides: equal for all, so made once."""
    import torch

    return torch.ones(batch, size), torch.arange(size).repeat(batch, 1)

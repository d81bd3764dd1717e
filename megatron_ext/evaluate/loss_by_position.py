"""Loss by position in long documents, under several settings of the rotary frequencies.

Shape legend: S tokens of a window, K windows, B bins of positions, V vocabulary, H width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ext.data.indexed import IndexedCorpus
from megatron_ext.legal import unknown_choice
from megatron_ext.models import rope

METHODS = ("as_trained", "linear", "dynamic")
ROWS = 512
"""Positions whose logits exist at a time: the head of a whole long window would be gigabytes."""


@dataclass(frozen=True)
class Setting:
    """What is done to the rotary frequencies at inference."""

    method: str = "as_trained"
    factor: float = 1.0

    @classmethod
    def read(cls, word: str) -> "Setting":
        """``as_trained``, ``linear=8`` or ``dynamic=8``.

        Raises:
            ValueError: another word, or a factor below 1.
        """
        method, _, factor = word.partition("=")
        if method not in METHODS:
            raise unknown_choice("--rope", method, METHODS)
        try:
            one = cls(method, float(factor or 1))
        except ValueError as error:
            raise ValueError(f"--rope {word}: {factor} is no number; write {method}=8.") from error
        if method != "as_trained" and not factor:
            raise ValueError(f"--rope {word} needs a factor: write {method}=8.")
        if not 1 <= one.factor < float("inf"):
            raise ValueError(f"--rope {word}: the factor must be at least 1.")
        if method == "as_trained" and factor:
            raise ValueError(f"--rope {word}: as_trained takes no factor.")
        return one

    @property
    def name(self) -> str:
        """Name in tables and pictures."""
        return self.method if self.method == "as_trained" else f"{self.method}={self.factor:g}"

    def frequencies(self, base: float, dim: int, *, length: int, trained: int) -> Tensor:
        """[D/2] for a text of ``length`` tokens."""
        if self.method == "linear":
            return rope.linear(base, dim, factor=self.factor)
        if self.method == "dynamic":
            return rope.dynamic_ntk(base, dim, factor=self.factor, length=length, trained=trained)
        return rope.frequencies(base, dim)


def windows(prefixes: list[str], length: int) -> dict[str, list[np.ndarray]]:
    """Pieces of ``length + 1`` tokens, each inside one document, by the corpus's name.

    Raises:
        ValueError: no document is that long.
    """
    found: dict[str, list[np.ndarray]] = {}
    longest = 0
    for prefix in prefixes:
        corpus = IndexedCorpus(prefix, key="--data")
        longest = max(longest, int(corpus.lengths.max()))
        found[Path(prefix).name] = [
            corpus.document(int(number))[start : start + length + 1]
            for number in np.flatnonzero(corpus.lengths > length)
            for start in range(0, int(corpus.lengths[number]) - length, length)
        ]
    found = {name: pieces for name, pieces in found.items() if pieces}
    if not found:
        raise ValueError(
            f"--length={length} needs a document of {length + 1} tokens, and the longest of --data "
            f"has {longest}: use a --length below {longest}."
        )
    return found


def score(
    model: Any, pieces: list[np.ndarray], setting: Setting, *, base: float, trained: int, bins: int
) -> np.ndarray:
    """Mean nats of each window and bin, [K, B]; bins are equal runs of positions.

    ``dynamic`` scores each position as generation would meet it: by the frequencies of a text that
    ends at its bin, not of the whole window. One forward of one window is in memory at a time.
    """
    length = len(pieces[0]) - 1
    dim = rope.rotated_channels(model)
    rows = []
    for piece in pieces:
        ids = torch.from_numpy(piece.astype(np.int64))
        loss_S = torch.empty(length)
        for start, end in _passes(setting, length, trained=trained, bins=bins):
            wanted = setting.frequencies(base, dim, length=end, trained=trained)
            rope.set_frequencies([model], wanted)
            loss_S[start:end] = token_losses(model, ids[: end + 1])[start:]
        rows.append(loss_S.double().reshape(bins, -1).mean(1).numpy())
    return np.stack(rows)


def _passes(setting: Setting, length: int, *, trained: int, bins: int) -> Iterator[tuple[int, int]]:
    """Positions [start, end) to take from a forward over the first ``end`` tokens."""
    ends = [length]
    if setting.method == "dynamic":  # up to the trained length the frequencies are the same
        edges = range(length // bins, length + 1, length // bins)
        ends = sorted({min(max(edge, trained), length) for edge in edges})
    yield from zip([0, *ends], ends)


@torch.no_grad()
def token_losses(model: Any, ids: Tensor) -> Tensor:
    """Nats of ids[1:], each predicted from those before it, [S]; ids are [S + 1]."""
    tokens = ids[:-1].unsqueeze(0)
    weight = None
    if model.share_embeddings_and_output_weights:
        weight = model.shared_embedding_or_output_weight()
    model.post_process = False  # Megatron then returns what the head would be given, [S, 1, H]
    try:
        hidden = model(tokens, torch.arange(tokens.shape[1]).unsqueeze(0), None)
    finally:
        model.post_process = True
    losses = []
    for rows, labels in zip(hidden.split(ROWS), ids[1:].split(ROWS)):
        logits = model.output_layer(rows, weight=weight)[0][:, 0, : model.true_vocab_size]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none"))
    return torch.cat(losses)

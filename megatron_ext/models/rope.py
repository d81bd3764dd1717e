"""Rotary frequencies: of a base, and stretched at inference over more tokens than were trained.

Shape legend: D rotated channels of a head. Frequencies are fp32 [D/2] in radians per token, the
fastest first. Neither stretch trains anything; both are here to be compared with training on.
"""

from typing import Any

import torch
from torch import Tensor


def frequencies(base: float, dim: int) -> Tensor:
    """``base ** (-2i / D)`` for pair i of ``dim`` = D rotated channels (RoFormer, 2104.09864)."""
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def linear(base: float, dim: int, *, factor: float) -> Tensor:
    """Every frequency over ``factor``: positions are interpolated (Chen et al., arXiv:2306.15595).

    transformers' rope type ``linear``.

    Raises:
        ValueError: the factor is below 1.
    """
    _check(factor)
    return frequencies(base, dim) / factor


def dynamic_ntk(base: float, dim: int, *, factor: float, length: int, trained: int) -> Tensor:
    """Frequencies of a base that grows with the text: the slowest pair is interpolated most.

    ``base * (s L / L0 - (s - 1)) ** (D / (D - 2))`` for ``length`` L, ``trained`` L0 and ``factor``
    s; unchanged up to L0. transformers' rope type ``dynamic``, after bloc97 and emozilla; the
    derivation is in YaRN, arXiv:2309.00071.

    Raises:
        ValueError: the factor is below 1, or fewer than two pairs rotate.
    """
    _check(factor)
    if dim <= 2:
        raise ValueError(f"dynamic NTK needs D > 2 rotated channels for D / (D - 2), not {dim}.")
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return frequencies(base * stretch ** (dim / (dim - 2)), dim)


def _check(factor: float) -> None:
    if factor < 1:
        raise ValueError(f"a RoPE factor of {factor:g} would shorten the context: use 1 or more.")


def rotated_channels(chunk: Any) -> int:
    """D of a built model."""
    return 2 * int(_rotary(chunk).inv_freq.shape[0])


def set_frequencies(chunks: list[Any], wanted: Tensor) -> None:
    """Give every chunk other frequencies from its next forward on."""
    for chunk in chunks:
        rotary = _rotary(chunk)
        rotary.inv_freq = wanted.to(rotary.inv_freq.device)
        type(rotary).forward.cache_clear()


def set_rotary_base(chunks: list[Any], base: float) -> None:
    """Give every chunk another RoPE base from its next forward on."""
    for chunk in chunks:
        set_frequencies([chunk], frequencies(base, rotated_channels(chunk)))


def _rotary(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk.rotary_pos_emb

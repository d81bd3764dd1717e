"""Which parent layer each layer of a deeper model is: the map of a depth up-scaling, checked.

Ranges are half-open, as Python's: ``12:28`` is layers 12 to 27.
"""

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class NewLayer:
    """One layer of the deeper model."""

    parent: int
    copy: bool = False
    """Whether an earlier layer of the deeper model already is this parent layer."""

    identity: bool = False
    """Whether its output projections are zero, so that it passes its input on unchanged."""


Range = tuple[int, int]


def parse_ranges(text: str) -> list[Range]:
    """``0:24,8:32`` as pairs.

    Raises:
        ValueError: the text is of another form.
    """
    try:
        pairs = [tuple(map(int, part.split(":"))) for part in text.split(",")]
    except ValueError:
        pairs = [()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"'{text}' is not a list of layer ranges: write them as 0:24,8:32.")
    return [(pair[0], pair[1]) for pair in pairs]


def copy_blocks(num_layers: int, blocks: list[Range]) -> list[NewLayer]:
    """Each block once more, right behind itself (Yi-9B: ``12:28`` of 32 layers makes 48).

    Raises:
        ValueError: a block is out of range, or blocks overlap or are out of order.
    """
    _in_range(num_layers, blocks, "--copy")
    for before, after in itertools.pairwise(blocks):
        if after[0] < before[1]:
            raise ValueError(
                f"--copy {_written(blocks)}: block {after[0]}:{after[1]} "
                f"{'overlaps' if after[1] > before[0] else 'comes before'} {before[0]}:"
                f"{before[1]}: give blocks in ascending order without a shared layer."
            )
    new, start = [], 0
    for first, end in blocks:
        new += [NewLayer(i) for i in range(start, end)]
        new += [NewLayer(i, copy=True) for i in range(first, end)]
        start = end
    return new + [NewLayer(i) for i in range(start, num_layers)]


def join_ranges(num_layers: int, ranges: list[Range]) -> list[NewLayer]:
    """Ranges one behind the other (SOLAR: ``0:24,8:32``).

    Raises:
        ValueError: a range is out of range or out of order, or a layer would be lost.
    """
    _in_range(num_layers, ranges, "--map")
    layers = [i for first, end in ranges for i in range(first, end)]
    for before, after in itertools.pairwise(ranges):
        if after[0] <= before[0] or after[1] <= before[1]:
            raise ValueError(
                f"--map {_written(ranges)} = {spell(layers)}: {after[0]}:{after[1]} does not start "
                f"and end later than {before[0]}:{before[1]}, and layers only work in their order."
            )
    lost = sorted(set(range(num_layers)) - set(layers))
    if lost:
        raise ValueError(
            f"--map {_written(ranges)} = {spell(layers)} loses layers {spell(lost)} of "
            f"{num_layers}: cover every layer."
        )
    return _marked(layers)


def insert_identities(num_layers: int, every: int) -> list[NewLayer]:
    """A copy that adds nothing, behind every ``every`` layers (LLaMA-Pro).

    Raises:
        ValueError: the layers do not divide into such groups.
    """
    if every < 1 or num_layers % every:
        raise ValueError(
            f"--insert-identity every={every} does not divide the {num_layers} layers: "
            f"use a divisor of {num_layers}."
        )
    new = []
    for i in range(num_layers):
        new.append(NewLayer(i))
        if (i + 1) % every == 0:
            new.append(NewLayer(i, copy=True, identity=True))
    return new


def explicit(parents: list[int]) -> list[NewLayer]:
    """Any order at all, unchecked: for experiments with wrong ones."""
    return _marked(parents)


def spell(layers: list[int]) -> str:
    """A list of layers in runs: ``[0..27] + [12..31]``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return " + ".join(f"[{a}..{b}]" if b > a else f"[{a}]" for a, b in runs)


def _marked(layers: list[int]) -> list[NewLayer]:
    return [NewLayer(i, copy=i in layers[:place]) for place, i in enumerate(layers)]


def _written(ranges: list[Range]) -> str:
    return ",".join(f"{first}:{end}" for first, end in ranges)


def _in_range(num_layers: int, ranges: list[Range], option: str) -> None:
    for first, end in ranges:
        if not 0 <= first < end <= num_layers:
            raise ValueError(
                f"{option} {_written(ranges)}: {first}:{end} is not a range of layers 0:"
                f"{num_layers} (half-open: the last layer is {num_layers - 1})."
            )

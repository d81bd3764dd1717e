"""Boxes inside tensors: where a flat range lies, and what two boxes share.

A distributed optimizer owns flat ranges of parameters that need not end at rows. Cut into boxes,
such a range can be stored as part of the whole tensor and be read back under any other layout.
"""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: where it starts and how far it reaches on each axis."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    def numel(self) -> int:
        """Elements inside."""
        return prod(self.size)

    def shifted(self, by: tuple[int, ...]) -> "Box":
        """The same box seen from an origin ``by`` further back."""
        return Box(tuple(o + b for o, b in zip(self.offset, by, strict=True)), self.size)


def whole(shape: tuple[int, ...]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def cut(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Boxes that together are elements ``start:stop`` of the flattened tensor, in that order.

    Each is contiguous in the flattened tensor. A matrix needs at most three: the rest of a row,
    whole rows, the beginning of a row.
    """
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    inner = prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows are first:last
    if first > last:  # inside one row
        return _in_row(shape, last, start - last * inner, stop - last * inner)
    head = _in_row(shape, first - 1, start - (first - 1) * inner, inner) if start % inner else []
    body = [Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))]
    tail = _in_row(shape, last, 0, stop - last * inner) if stop % inner else []
    return head + (body if last > first else []) + tail


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    boxes = cut(tuple(shape[1:]), start, stop)
    return [Box((row, *box.offset), (1, *box.size)) for box in boxes]


def overlap(a: Box, b: Box) -> Box | None:
    """What ``a`` and ``b`` share; None when they are apart."""
    begin = tuple(map(max, a.offset, b.offset))
    end = (
        min(ao + size_a, bo + size_b)
        for ao, size_a, bo, size_b in zip(a.offset, a.size, b.offset, b.size, strict=True)
    )
    size = tuple(e - s for s, e in zip(begin, end, strict=True))
    return Box(begin, size) if all(n > 0 for n in size) else None


def uncovered(shape: tuple[int, ...], boxes: list[Box]) -> str | None:
    """Why ``boxes`` are not exactly the tensor, in words; None when they are."""
    for box in boxes:
        for start, size, length in zip(box.offset, box.size, shape, strict=True):
            if start < 0 or start + size > length:
                return f"{box} reaches outside {tuple(shape)}"
    held = sum(box.numel() for box in boxes)
    if held != prod(shape):
        return f"{held} of {prod(shape)} elements are there"
    clash = _clash(boxes, axis=0)
    return None if clash is None else f"{clash[0]} and {clash[1]} overlap"


def _clash(boxes: list[Box], *, axis: int) -> tuple[Box, Box] | None:
    """Two boxes that overlap. Those apart on one axis are never compared on the next.

    A large checkpoint has 100,000 boxes: comparing each pair of a layer's took ten seconds.
    """
    if len(boxes) < 2:
        return None
    if axis == len(boxes[0].offset):  # together on every axis, perhaps through a third one
        pairs = ((a, b) for n, a in enumerate(boxes) for b in boxes[:n])
        return next(((a, b) for a, b in pairs if not a.offset or overlap(a, b)), None)
    together: list[Box] = []
    reach = 0
    for box in sorted(boxes, key=lambda box: box.offset[axis]):
        if together and box.offset[axis] >= reach:
            if clash := _clash(together, axis=axis + 1):
                return clash
            together = []
        together.append(box)
        reach = max(reach, box.offset[axis] + box.size[axis])
    return _clash(together, axis=axis + 1)

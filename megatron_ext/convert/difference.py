"""Two checkpoints compared tensor by tensor and layer by layer, at whatever layouts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext.checkpoint.folder import verify
from megatron_ext.convert.sharded_reader import ShardedTensor, open_sharded


@dataclass(frozen=True)
class Difference:
    """What two checkpoints hold under one key."""

    key: str
    layer: int | None
    verdict: str
    """``equal``, ``differs``, ``only in the first``, ``only in the second``, ``other shape`` ..."""

    largest: float = 0.0
    """Largest absolute difference."""


def compare(
    first: Path, second: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Difference]:
    """Every tensor of either, in the first one's order; random number state is left out.

    Raises:
        DamagedCheckpoint: one of them is not as it was sealed, by the check that loading does.
    """
    for path in (first, second):
        verify(path)
    a, b = open_sharded(first).tensors, open_sharded(second).tensors
    keys = [key for key in {**a, **b} if not key.startswith("rng.")]
    total, done = sum(a[k].bytes for k in keys if k in a), 0
    for key in keys:
        if key not in a or key not in b:
            yield Difference(key, None, f"only in the {'first' if key in a else 'second'}")
        elif a[key].shape != b[key].shape:
            yield Difference(key, None, f"other shape: {a[key].shape} and {b[key].shape}")
        else:
            yield from _by_layer(a[key], b[key])
        done += a[key].bytes if key in a else 0
        progress(done, total)


def _by_layer(a: ShardedTensor, b: ShardedTensor) -> Iterator[Difference]:
    stacked = ".layers." in a.key
    for layer in range(a.shape[0]) if stacked else (None,):
        one, other = a.read(layer), b.read(layer)
        if one.dtype == other.dtype and torch.equal(
            one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
        ):
            yield Difference(a.key, layer, "equal")
            continue
        largest = float((one.double() - other.double()).abs().max())
        verdict = "differs" if largest else f"equal numbers, {a.dtype} and {b.dtype}"
        yield Difference(a.key, layer, verdict, largest)

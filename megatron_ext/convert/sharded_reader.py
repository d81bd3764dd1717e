"""Reading one tensor, or one layer of it, out of a distributed checkpoint of any layout.

Bytes go from the file straight to their place: a layer that was saved on one rank is never held
twice. No process group, no model and no Megatron are needed.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint import index
from megatron_ext.checkpoint.index import Piece
from megatron_ext.checkpoint.rectangles import Box, overlap, whole
from megatron_ext.convert.stored import Stored, chunk_at


@dataclass(frozen=True)
class ShardedTensor:
    """One key of a checkpoint. Layers of one kind are stacked along a leading axis."""

    folder: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self, layer: int | None = None) -> Tensor:
        """All of it, or one layer of a stack.

        Raises:
            ValueError: parts are missing.
        """
        wanted = whole(self.shape)
        if layer is not None:
            wanted = Box((layer, *wanted.offset[1:]), (1, *self.shape[1:]))
        out = torch.empty(wanted.size, dtype=self.dtype)
        missing = out.numel()
        for piece in self.pieces:
            shared = overlap(wanted, piece.box)
            if shared is not None:
                self._copy(piece, shared, wanted, out)
                missing -= shared.numel()
        if missing:
            where = self.key if layer is None else f"{self.key} of layer {layer}"
            raise ValueError(f"{where}: {missing} of {out.numel()} numbers are not stored.")
        return out if layer is None else out[0]

    def _copy(self, piece: Piece, shared: Box, wanted: Box, out: Tensor) -> None:
        """Put what ``piece`` holds of ``wanted`` into ``out``."""
        stored = chunk_at(self.folder / piece.file, piece.offset, piece.length)
        if stored.shape != piece.box.size:
            raise ValueError(
                f"{stored.path} holds {list(stored.shape)} where {index.INDEX} promises "
                f"{list(piece.box.size)}: they are of different checkpoints."
            )
        target = out[tuple(_slices(shared, wanted))]
        if target.is_contiguous() and shared == piece.box:
            flat = Stored(stored.path, stored.begin, stored.dtype, tuple(target.shape))
            flat.read_rows(target)
        else:
            target.copy_(_part(stored, piece.box, shared))


def _part(stored: Stored, box: Box, shared: Box) -> Tensor:
    """The ``shared`` part of a stored box; of a stack of layers, only the layers asked for."""
    first, rows = shared.offset[0] - box.offset[0], shared.size[0]
    block = torch.empty((rows, *stored.shape[1:]), dtype=stored.dtype)
    stored.read_rows(block, row=first)
    inner = [slice(None), *_slices(shared, box)[1:]]
    return block[tuple(inner)]


def _slices(inner: Box, outer: Box) -> list[slice]:
    starts = [i - o for i, o in zip(inner.offset, outer.offset)]
    return [slice(start, start + size) for start, size in zip(starts, inner.size)]


@dataclass(frozen=True)
class ShardedFolder:
    """An opened distributed checkpoint."""

    path: Path
    tensors: dict[str, ShardedTensor]


def open_sharded(path: Path) -> ShardedFolder:
    """Find every tensor of a distributed checkpoint, without reading one.

    Raises:
        FileNotFoundError: it is no such checkpoint, or a file of it is missing.
        ValueError: its metadata is damaged or foreign.
    """
    table = path / index.INDEX
    if not table.is_file():
        raise FileNotFoundError(
            f"{table} does not exist: name a checkpoint folder, for instance "
            f"RUN_DIR/checkpoints/step_00001000."
        )
    stored = index.read(table.read_bytes())
    for name in sorted({piece.file for tensor in stored.values() for piece in tensor.pieces}):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} is missing, and {index.INDEX} lists it.")
    tensors = {
        key: ShardedTensor(path, key, tensor.shape, tensor.dtype, tensor.pieces)
        for key, tensor in stored.items()
    }
    return ShardedFolder(path, tensors)

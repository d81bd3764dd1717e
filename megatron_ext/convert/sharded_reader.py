"""Reading one tensor, or one layer of it, out of a distributed checkpoint of any layout.

Bytes go from the file straight to their place: a layer that was saved on one rank is never held
twice. No process group, no model and no Megatron are needed.
"""

from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint import index
from megatron_ext.checkpoint.index import Piece
from megatron_ext.checkpoint.rectangles import Box, overlap
from megatron_ext.convert.stored import Stored, chunk_at


@dataclass(frozen=True)
class ShardedTensor:
    """One key of a checkpoint. Layers of one kind are stacked along a leading axis."""

    folder: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    _chunks: dict[Piece, Stored] = field(default_factory=dict, compare=False, repr=False)

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self, layer: int | None = None, *, rows: tuple[int, int] | None = None) -> Tensor:
        """All of it, or one layer of a stack; or only ``rows`` = (first, number) of either.

        Raises:
            ValueError: parts are missing.
        """
        lead = () if layer is None else (layer,)
        shape = self.shape[len(lead) :]
        first, number = rows or (0, shape[0])
        offset = (*lead, first, *(0 for _ in shape[1:]))
        wanted = Box(offset, (*(1 for _ in lead), number, *shape[1:]))
        out = torch.empty(wanted.size, dtype=self.dtype)
        missing = out.numel()
        for piece in self.pieces:
            shared = overlap(wanted, piece.box)
            if shared is not None:
                self._copy(piece, shared, out[tuple(_slices(shared, wanted))])
                missing -= shared.numel()
        if missing:
            where = self.key if layer is None else f"{self.key} of layer {layer}"
            raise ValueError(f"{where}: {missing} of {out.numel()} numbers are not stored.")
        return out if layer is None else out[0]

    def _copy(self, piece: Piece, shared: Box, target: Tensor) -> None:
        """Put what ``piece`` holds of the box ``shared`` into ``target``."""
        stored = self._chunk(piece)
        run = _run(shared, piece.box)
        place = [i - o for i, o in zip(run.offset, piece.box.offset)]
        skipped = sum(at * prod(piece.box.size[axis + 1 :]) for axis, at in enumerate(place))
        begin = stored.begin + skipped * stored.dtype.itemsize
        if run == shared and target.is_contiguous():
            Stored(stored.path, begin, stored.dtype, run.size).read_rows(target)
        else:
            block = Stored(stored.path, begin, stored.dtype, run.size).read()
            target.copy_(block[tuple(_slices(shared, run))])

    def _chunk(self, piece: Piece) -> Stored:
        """Where a piece's elements lie; found once."""
        stored = self._chunks.get(piece)
        if stored is None:
            stored = chunk_at(self.folder / piece.file, piece.offset, piece.length)
            if stored.shape != piece.box.size:
                raise ValueError(
                    f"{stored.path} holds {list(stored.shape)} where {index.INDEX} promises "
                    f"{list(piece.box.size)}: they are of different checkpoints."
                )
            self._chunks[piece] = stored
        return stored


def _run(shared: Box, box: Box) -> Box:
    """The shortest contiguous run of ``box`` that holds ``shared``: whole in its later axes."""
    axis = next((a for a, size in enumerate(shared.size) if size > 1), len(shared.size) - 1) + 1
    return Box(
        shared.offset[:axis] + box.offset[axis:],
        shared.size[:axis] + box.size[axis:],
    )


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

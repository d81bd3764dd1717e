"""Tensors of a checkpoint, read box by box into any layout; no process group is needed."""

import io
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import IO, cast

import torch
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_ext.checkpoint import index
from megatron_ext.checkpoint.index import Piece, StoredTensor
from megatron_ext.checkpoint.rectangles import Box, overlap, whole
from megatron_ext.checkpoint.shard import Slot

SAFE_TORCH = (2, 10)  # before it, weights_only=True could be got round (CVE-2026-24747)


class TensorReader:
    """Reads what a folder's ``.metadata`` lists. The folder should have been verified."""

    def __init__(self, path: Path) -> None:
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if version < SAFE_TORCH:
            raise ValueError(
                f"torch {torch.__version__} cannot read checkpoints safely: install at least "
                f"{'.'.join(map(str, SAFE_TORCH))}."
            )
        self.path = path
        self.tensors: dict[str, StoredTensor] = index.read((path / index.INDEX).read_bytes())

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def read(self, key: str, box: Box | None = None) -> torch.Tensor:
        """One tensor, or the part of it in ``box``."""
        stored = self.tensors[key]
        box = box or whole(stored.shape)
        data = torch.empty(box.size, dtype=stored.dtype)
        self.fill([Slot(key, stored.shape, box, data)])
        return data

    def fill(self, slots: Iterable[Slot]) -> None:
        """Copy stored elements into the slots' memory, each stored piece read once.

        Elements outside the stored tensor are left as they are: a check of shapes comes before.
        """
        wanted: dict[Piece, list[tuple[Slot, Box]]] = defaultdict(list)
        for slot in slots:
            for piece in self.tensors[slot.key].pieces:
                if shared := overlap(piece.box, slot.box):
                    wanted[piece].append((slot, shared))
        by_file: dict[str, list[Piece]] = defaultdict(list)
        for piece in wanted:
            by_file[piece.file].append(piece)
        for name, pieces in by_file.items():
            handle = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW)
            with open(handle, "rb", buffering=0) as file:
                for piece in sorted(pieces, key=lambda piece: piece.offset):
                    data = self._piece(file, piece)
                    for slot, shared in wanted[piece]:
                        _copy(data, piece.box, slot, shared)

    def _piece(self, file: io.FileIO, piece: Piece) -> torch.Tensor:
        view = cast(IO[bytes], _create_file_view(file, piece.offset, piece.length))
        data = torch.load(view, map_location="cpu", weights_only=True)
        if not isinstance(data, torch.Tensor) or tuple(data.shape) != piece.box.size:
            raise ValueError(f"{self.path / piece.file} does not hold {piece.box} where listed")
        return data


@torch.no_grad()
def _copy(data: torch.Tensor, box: Box, slot: Slot, shared: Box) -> None:
    """Copy ``shared`` from ``data``, which holds ``box``, into the slot's memory."""
    target = slot.data.view(slot.box.size)
    for axis, (at, size) in enumerate(zip(shared.offset, shared.size, strict=True)):
        data = data.narrow(axis, at - box.offset[axis], size)
        target = target.narrow(axis, at - slot.box.offset[axis], size)
    target.copy_(data)

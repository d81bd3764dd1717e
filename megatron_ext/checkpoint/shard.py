"""One rank's file of tensors, hashed while it is written.

The bytes are those of torch's own torch_dist writer (a ``torch.save`` of each piece, one after
another), but no process is spawned, and the hash is computed beside the write.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_ext.checkpoint.index import Piece, StoredTensor
from megatron_ext.checkpoint.rectangles import Box

BESIDE = 1 << 20  # bytes from which hashing beside the write beats handing the work over


@dataclass(frozen=True)
class Slot:
    """A box of a stored tensor, and the memory it is saved from or loaded into."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    box: Box
    data: torch.Tensor
    """Contiguous elements of the box; its own shape may lack the box's leading axes of 1."""
    main: bool = True
    """Whether it is written from here, unless a data-parallel peer does that."""
    flexible: bool = False
    """Whether the first axis carries padding rows, which may differ in number."""
    shared: bool = False
    """Whether every data-parallel rank holds the same box."""
    blocks: Iterator[memoryview] | None = None
    """Where the elements come from instead, in order; ``data`` then only has their shape."""


@dataclass(frozen=True)
class Shard:
    """A file as it was written."""

    name: str
    bytes: int
    sha256: str
    tensors: dict[str, StoredTensor]


def write_shard(path: Path, slots: Iterable[Slot]) -> Shard:
    """Write ``slots`` to ``path`` and flush them to disk."""
    tensors: dict[str, StoredTensor] = {}
    with open(path, "xb", buffering=BESIDE) as file, _without_crc(), _hashing(file) as sink:
        for slot in slots:
            start = sink.bytes
            sink.blocks, sink.expected = slot.blocks, slot.data.nbytes
            torch.save(_detached(slot), sink)
            piece = Piece(slot.box, path.name, start, sink.bytes - start)
            known = tensors.get(slot.key)
            pieces = (*known.pieces, piece) if known else (piece,)
            tensors[slot.key] = StoredTensor(slot.shape, slot.data.dtype, pieces)
        file.flush()
        os.fsync(file.fileno())
        return Shard(path.name, sink.bytes, sink.digest.hexdigest(), tensors)


def _detached(slot: Slot) -> torch.Tensor:
    """The slot's elements on the host, in a storage of their own size."""
    data = slot.data.detach().reshape(slot.box.size).cpu().contiguous()
    storage = data.untyped_storage()
    if storage.nbytes() == data.nbytes:
        return data
    # torch.save writes the whole storage of a view: give it one that ends where the view does.
    begin = data.storage_offset() * data.itemsize
    window = storage[begin : begin + data.nbytes]
    return torch.empty(0, dtype=data.dtype).set_(window).reshape(slot.box.size)


class _Sink:
    """A file that counts and hashes what passes."""

    def __init__(self, file: Any, pool: ThreadPoolExecutor) -> None:
        self.file, self.pool, self.digest, self.bytes = file, pool, hashlib.sha256(), 0
        self.blocks: Iterator[memoryview] | None = None
        self.expected = 0

    def write(self, block: Any) -> int:
        view = memoryview(block).cast("B")
        if self.blocks is not None and len(view) == self.expected:  # the elements, and no header
            return self._stream()
        hashed = self.pool.submit(self.digest.update, view) if len(view) >= BESIDE else None
        try:
            self.file.write(view)
        finally:
            if hashed:
                hashed.result()
        if not hashed:
            self.digest.update(view)
        self.bytes += len(view)
        return len(view)

    def _stream(self) -> int:
        """Write and hash ``blocks`` in turn: each is in the core's cache for both."""
        done, blocks, self.blocks = 0, self.blocks or iter(()), None
        for part in blocks:
            self.digest.update(part)
            self.file.write(part)
            done += len(part)
        assert done == self.expected, f"{done} of {self.expected} bytes were streamed"
        self.bytes += done
        return done

    def flush(self) -> None:
        """torch.save asks for it after every tensor; once at the end is enough."""


@contextmanager
def _hashing(file: BinaryIO) -> Any:
    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint-hash") as pool:
        yield _Sink(file, pool)


@contextmanager
def _without_crc() -> Any:
    """Leave out the zip records' CRC-32: SHA-256 covers them, and torch does not read it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)

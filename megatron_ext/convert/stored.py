"""Tensors where they lie on disk: read by rows, never whole files, never mapped into memory.

Safetensors files, torch ``.bin`` files and the chunks of a distributed checkpoint all keep a
tensor as one run of bytes; only finding that run differs.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

BLOCK = 1 << 20  # bytes; between reading, summing and writing a block stays in its core's cache


@dataclass(frozen=True)
class Stored:
    """One contiguous tensor in a file."""

    path: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (one number, for a vector)."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read_rows(self, out: Tensor, *, row: int = 0) -> None:
        """Fill ``out`` with the rows from ``row`` on.

        Raises:
            OSError: the file ends early.
        """
        buffer = memory(out)
        with open(self.path, "rb", buffering=0) as file:
            read_at(file.fileno(), buffer, self.begin + row * self.row_bytes, self.path)

    def blocks(self, row: int, rows: int) -> Iterator[memoryview]:
        """The bytes of ``rows`` rows from ``row`` on, each block in the place of the one before."""
        buffer = memory(torch.empty(BLOCK, dtype=torch.uint8))
        begin, size = self.begin + row * self.row_bytes, rows * self.row_bytes
        with open(self.path, "rb", buffering=0) as file:
            for done in range(0, size, BLOCK):
                part = buffer[: min(BLOCK, size - done)]
                read_at(file.fileno(), part, begin + done, self.path)
                yield part

    def read(self) -> Tensor:
        """The whole tensor."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_rows(out)
        return out


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, writable in place."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_at(handle: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill ``buffer`` from a file's ``offset`` on; Linux reads at most 2 GiB at a time."""
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise OSError(f"{path} ends {len(buffer) - done} bytes early: it is truncated")
        done += count


def safetensors_file(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds: an 8-byte length, a JSON header, then the tensors.

    Raises:
        ValueError: the header is not one, a dtype is unknown, or the file is truncated.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is not a safetensors file, or it is truncated.")
        header = json.loads(file.read(length))
    stored = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: {name} is stored as {entry['dtype']}; known are {', '.join(DTYPES)}."
            )
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        item = Stored(path, begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if end > size or end - begin != item.bytes:
            raise ValueError(f"{path}: {name} lies outside the file: it is truncated.")
        stored[name] = item
    return stored


def bin_file(path: Path) -> dict[str, Stored]:
    """What a torch ``.bin`` file holds. Only weights are unpickled; nothing can run.

    Raises:
        ValueError: a tensor is not contiguous, or the file holds something else than tensors.
    """
    with open(path, "rb") as file:
        content = _laid_out(file, str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not named tensors.")
    return {name: stored_at(path, 0, tensor, name) for name, tensor in content.items()}


def chunk_at(path: Path, begin: int, length: int) -> Stored:
    """A tensor that torch.save wrote at ``begin`` of a file, as distributed checkpoints do."""
    with open(path, "rb") as file:
        window = _Window(file.fileno(), begin, length)
        tensor = _laid_out(window, f"{path} at byte {begin}")
    return stored_at(path, begin, tensor, f"the chunk at byte {begin}")


def stored_at(path: Path, base: int, tensor: Tensor, name: str) -> Stored:
    """Where ``tensor``, loaded without its numbers, lies in ``path``.

    Raises:
        ValueError: it is not one run of bytes.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_contiguous():
        raise ValueError(f"{path}: {name} is not a contiguous tensor.")
    begin = base + int(tensor.untyped_storage()._checkpoint_offset or 0)
    begin += int(tensor.storage_offset()) * tensor.dtype.itemsize
    return Stored(path, begin, tensor.dtype, tuple(tensor.shape))


def _laid_out(file: Any, where: str) -> Any:
    """torch.load of shapes and places only: fake tensors hold no memory (torch 2.6 and later)."""
    from pickle import UnpicklingError

    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            return torch.load(file, weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where} is not a file of plain tensors: {reason}") from error


class _Window(BytesIO):
    """The part of a file that one torch.save wrote, read on demand."""

    def __init__(self, handle: int, begin: int, length: int) -> None:
        super().__init__()
        self._handle, self._begin, self._length, self._at = handle, begin, length, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._length - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._handle, size, self._begin + self._at)
        self._at += len(data)
        return data

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

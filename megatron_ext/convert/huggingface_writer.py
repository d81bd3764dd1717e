"""Writing a Hugging Face folder: shards of a chosen size, filled in any order, with an index."""

import json
import os
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.atomic import write_text
from megatron_ext.convert.huggingface import SAFETENSORS_INDEX
from megatron_ext.convert.stored import NAMES, Stored, memory

SHARD_BYTES = 5 * 10**9


class FolderWriter:
    """Every tensor's place is known before the first byte is written."""

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
        *,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder = folder
        self.places: dict[str, Stored] = {}
        shards = _shards(tensors, shard_bytes)
        self._handles: dict[Path, int] = {}
        for number, shard in enumerate(shards):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(folder / name, {key: tensors[key] for key in shard})
        if len(shards) > 1:
            self._write_index()

    def _lay_out(self, path: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (shape, dtype) in tensors.items():
            end = at + prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [at, end],
            }
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._handles[path] = handle
        os.pwrite(handle, len(text).to_bytes(8, "little") + text, 0)
        begin = 8 + len(text)
        os.ftruncate(handle, begin + at)
        for name, (shape, dtype) in tensors.items():
            self.places[name] = Stored(path, begin, dtype, shape)
            begin += self.places[name].bytes

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_size": sum(place.bytes for place in self.places.values())},
            "weight_map": {name: place.path.name for name, place in sorted(self.places.items())},
        }
        write_text(self.folder / SAFETENSORS_INDEX, json.dumps(index, indent=2) + "\n")

    def write_rows(self, name: str, rows: Tensor, *, row: int = 0) -> None:
        """Put ``rows`` into tensor ``name`` from ``row`` on."""
        place = self.places[name]
        data = memory(rows)
        offset, done = place.begin + row * place.row_bytes, 0
        while done < len(data):
            done += os.pwrite(
                self._handles[place.path], data[done : done + (1 << 30)], offset + done
            )

    def finish(self) -> None:
        """Flush every shard to disk."""
        for handle in self._handles.values():
            os.fsync(handle)
        self.abandon()

    def abandon(self) -> None:
        """Close the shards of a folder that will not be finished."""
        while self._handles:
            os.close(self._handles.popitem()[1])


def _shards(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], shard_bytes: int
) -> list[list[str]]:
    """Names per shard: in order, each as full as it can be; a larger tensor has one alone."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, (shape, dtype) in tensors.items():
        size = prod(shape) * dtype.itemsize
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards

"""The table of a torch_dist checkpoint: which box of which tensor lies where in which file.

On disk it is torch's ``.metadata``, so that Megatron's own loader reads our checkpoints. That
file is a pickle: it is read here through an allow-list of inert types, never by pickle itself.
"""

import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from megatron_ext.checkpoint.rectangles import Box, uncovered

INDEX = ".metadata"

_TYPES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name in dir(torch) if type(getattr(torch, name)) is torch.dtype)),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
}
"""All that a .metadata of torch or of Megatron needs. None of it runs code of the file's choice."""


@dataclass(frozen=True)
class Piece:
    """One stored box of a tensor and the bytes that hold it."""

    box: Box
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def write(tensors: dict[str, StoredTensor]) -> bytes:
    """The bytes of ``.metadata``.

    Raises:
        ValueError: the pieces of a tensor leave a gap or overlap.
    """
    state: dict[str, Any] = {}
    storage: dict[metadata.MetadataIndex, Any] = {}
    for key, tensor in tensors.items():
        why = uncovered(tensor.shape, [piece.box for piece in tensor.pieces])
        if why:
            raise ValueError(f"the ranks do not save {key} exactly once: {why}")
        chunks = []
        for number, piece in enumerate(tensor.pieces):
            offset = torch.Size(piece.box.offset)
            chunks.append(metadata.ChunkStorageMetadata(offset, torch.Size(piece.box.size)))
            storage[metadata.MetadataIndex(key, offset, number)] = filesystem._StorageInfo(
                piece.file, piece.offset, piece.length
            )
        properties = metadata.TensorProperties(dtype=tensor.dtype)
        shape = torch.Size(tensor.shape)
        state[key] = metadata.TensorStorageMetadata(properties, shape, chunks)
    whole = metadata.Metadata(state, {}, storage, metadata.StorageMeta(), "1.0.0")
    return pickle.dumps(whole)


def merge(parts: Iterable[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """One table of what several ranks wrote.

    Raises:
        ValueError: two ranks disagree about a tensor.
    """
    whole: dict[str, StoredTensor] = {}
    for part in parts:
        for key, tensor in part.items():
            known = whole.get(key)
            if known is None:
                whole[key] = tensor
                continue
            if (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(
                    f"ranks disagree about {key}: {known.shape} {known.dtype} and "
                    f"{tensor.shape} {tensor.dtype}"
                )
            whole[key] = StoredTensor(known.shape, known.dtype, known.pieces + tensor.pieces)
    return whole


def read(data: bytes) -> dict[str, StoredTensor]:
    """The tensors a ``.metadata`` lists.

    Raises:
        ValueError: it asks for a type outside the allow-list, or names a file outside its folder.
    """
    try:
        whole = _AllowListed(io.BytesIO(data)).load()
        places = {(at.fqn, at.offset): info for at, info in whole.storage_data.items()}
        tensors = {}
        for key, stored in whole.state_dict_metadata.items():
            if type(stored) is metadata.TensorStorageMetadata:
                tensors[key] = _tensor(key, stored, places)
    except (pickle.UnpicklingError, AttributeError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"{INDEX} is not a table of tensors: {error}") from None
    return tensors


def _tensor(key: str, stored: Any, places: dict) -> StoredTensor:
    pieces = []
    for chunk in stored.chunks:
        info = places[key, chunk.offsets]
        if type(info.relative_path) is not str or "/" in info.relative_path:
            raise ValueError(f"{INDEX} places {key} in {info.relative_path!r}, outside its folder")
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        pieces.append(Piece(box, info.relative_path, int(info.offset), int(info.length)))
    return StoredTensor(tuple(stored.size), stored.properties.dtype, tuple(pieces))


class _AllowListed(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return super().find_class(module, name)

"""The order of documents in one epoch of one source, built in memory or verified from a file."""

import json
import os
import uuid
import zlib
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from megatron_ext.atomic import write_text
from megatron_ext.data.indexed import IndexedCorpus
from megatron_ext.jit import compiled

VERSION = 1
"""Raised when the same seed would give another order."""


@dataclass(frozen=True)
class Epoch:
    """Documents in the order of one epoch."""

    starts: np.ndarray
    """int64: where each document begins in the .bin, in tokens."""

    ends: np.ndarray
    """int64: tokens of the epoch up to and with each document."""


def document_order(count: int, *, seed: tuple[int, ...]) -> np.ndarray:
    """A permutation of ``count`` documents, the same on every machine and numpy version.

    The raw output of PCG64 is fixed for good, which Generator.permutation's use of it is not.
    Each number is cut to its upper bits, the document's own number put below them, and all sorted:
    sorting numbers is several times faster than sorting indices by them.
    """
    bits = np.uint64(max(count - 1, 1).bit_length())
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    keys >>= bits
    keys <<= bits
    keys |= np.arange(count, dtype=np.uint64)
    compiled(sort_even)(keys, np.empty_like(keys))
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    return keys.view(np.int64)


def sort_even(keys: np.ndarray, spare: np.ndarray) -> None:
    """Sort uint64 that are spread evenly, in place: by 12 bits, by the 12 above, then by insertion.

    Up to 2**24 of them are nearly sorted after the two passes; more cost a few moves each.
    """
    digit = np.uint64(4095)
    for shift in (np.uint64(40), np.uint64(52)):
        places = np.zeros(4097, dtype=np.int64)
        for key in keys:
            places[np.int64((key >> shift) & digit) + 1] += 1
        for value in range(4096):
            places[value + 1] += places[value]
        for key in keys:
            place = np.int64((key >> shift) & digit)
            spare[places[place]] = key
            places[place] += 1
        keys, spare = spare, keys
    for i in range(1, len(keys)):
        key, j = keys[i], i
        while j > 0 and keys[j - 1] > key:
            keys[j] = keys[j - 1]
            j -= 1
        keys[j] = key


def build_epoch(corpus: IndexedCorpus, *, seed: tuple[int, ...]) -> Epoch:
    """Shuffle the corpus's documents by ``seed``."""
    order = document_order(corpus.num_documents, seed=seed)
    return Epoch(*in_order(order, corpus.starts, corpus.lengths))


def in_order(
    order: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Starts of the documents in ``order``, and the sums of their lengths; both int64.

    ``order`` is a permutation: no index needs to be looked at before it is taken.
    """
    ends = np.empty(len(order), dtype=np.int64)
    np.cumsum(lengths.take(order, mode="clip"), out=ends)
    return starts.take(order, mode="clip"), ends


def epoch_path(cache: str | Path, corpus: IndexedCorpus, *, seed: tuple[int, ...]) -> Path:
    """Where the epoch's order is kept: a name made of all that decides it."""
    name = json.dumps([VERSION, corpus.digest, list(seed)])
    return Path(cache) / f"epoch_{sha256(name.encode()).hexdigest()[:24]}.npy"


def load_epoch(cache: str | Path, corpus: IndexedCorpus, *, seed: tuple[int, ...]) -> Epoch:
    """Take the epoch from ``cache`` if it is there and whole, else build it and leave it there.

    Every rank may call this at once: files are renamed into place, and equal whoever wrote them.
    """
    path = epoch_path(cache, corpus, seed=seed)
    if not is_whole(path):
        save_epoch(path, build_epoch(corpus, seed=seed))
    starts, ends = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    if len(ends) != corpus.num_documents or int(ends[-1]) != corpus.num_tokens:
        raise ValueError(
            f"data.index_cache={cache}: {path.name} orders {len(ends)} documents of "
            f"{int(ends[-1])} tokens and {corpus.prefix} has {corpus.num_documents} of "
            f"{corpus.num_tokens}: delete the file."
        )
    return Epoch(starts=starts, ends=ends)


def save_epoch(path: Path, epoch: Epoch) -> None:
    """Write the epoch and, last, the checksum without which it is not taken as whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(aside, "xb") as file:
            np.save(file, np.stack([epoch.starts, epoch.ends]))
            file.flush()
            os.fsync(file.fileno())
        checksum = _checksum(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    write_text(path.with_suffix(".crc32"), checksum)


def is_whole(path: Path) -> bool:
    """Whether the file is there and is what was written; reading it costs 1 s a few GB."""
    mark = path.with_suffix(".crc32")
    return path.is_file() and mark.is_file() and mark.read_text() == _checksum(path)


def _checksum(path: Path) -> str:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return f"{value:08x} {path.stat().st_size}"

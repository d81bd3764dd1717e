"""A Megatron ``.bin``/``.idx`` pair as numpy arrays, read without megatron or torch."""

import hashlib
import json
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
"""Magic 9, version 8, dtype code 1, sequence count 8, document-index count 8."""

DTYPES: dict[int, type[np.number]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Megatron's codes of the token types an index can name; its two float types hold no tokens."""

WHOLE_BYTES = 64 * 2**20
"""Files up to this size are fingerprinted whole, larger ones by 64 blocks of 1 MiB."""


class IndexedCorpus:
    """One indexed corpus: where each document starts, how long it is, and all tokens."""

    def __init__(self, prefix: str | Path, *, key: str = "data.sources") -> None:
        """Open ``<prefix>.bin`` and ``<prefix>.idx``; ``key`` names them in refusals.

        Raises:
            ValueError: the pair is missing, empty, truncated or not Megatron's.
        """
        self.prefix = str(prefix)
        self.key = key
        self.idx_path, self.bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise self._refusal(f"{path.name} is missing: write it with tools.prepare")
        self._read_index()
        self._map_tokens()

    def _refusal(self, why: str) -> ValueError:
        return ValueError(f"{self.key}={self.prefix}: {why}.")

    def _read_index(self) -> None:
        size = self.idx_path.stat().st_size
        with open(self.idx_path, "rb") as file:
            head = file.read(HEADER_BYTES)
        if not head:
            raise self._refusal(f"{self.idx_path.name} is empty (0 bytes)")
        if len(head) < HEADER_BYTES or head[:9] != MAGIC:
            raise self._refusal(f"{self.idx_path.name} does not begin as a Megatron index does")
        version, code, sequences, documents = struct.unpack("<QBQQ", head[9:])
        if version != 1 or code not in DTYPES:
            raise self._refusal(
                f"{self.idx_path.name} has version {version} and token type {code}, which no "
                f"Megatron writes: index the text again with tools.prepare"
            )
        needed = HEADER_BYTES + 12 * sequences + 8 * documents
        if size < needed:
            raise self._refusal(
                f"{self.idx_path.name} is truncated: {sequences} sequences and {documents} "
                f"document marks need {needed} bytes and it has {size}"
            )
        self.dtype = np.dtype(DTYPES[code])
        raw = np.memmap(self.idx_path, mode="r", dtype=np.uint8)
        at = HEADER_BYTES
        lengths = raw[at : at + 4 * sequences].view(np.int32)
        at += 4 * sequences
        pointers = raw[at : at + 8 * sequences].view(np.int64)
        at += 8 * sequences
        marks = np.asarray(raw[at : at + 8 * documents].view(np.int64))
        self._set_documents(np.asarray(lengths), np.asarray(pointers), marks)

    def _set_documents(self, lengths: np.ndarray, pointers: np.ndarray, marks: np.ndarray) -> None:
        if len(marks) < 2 or not len(lengths):
            raise self._refusal("it is empty: 0 documents")
        if marks[0] != 0 or marks[-1] != len(lengths):
            raise self._refusal(
                f"{self.idx_path.name} marks its last document at sequence {marks[-1]} of "
                f"{len(lengths)}: index the text again with tools.prepare"
            )
        if len(marks) == len(lengths) + 1:
            self.lengths = lengths
            self.starts = pointers // self.dtype.itemsize
        else:  # documents of several sequences, as Megatron's sentence splitting writes them
            ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            self.lengths = np.diff(ends[marks])
            self.starts = ends[marks[:-1]]
        self.num_documents = len(self.lengths)
        self.num_tokens = int(self.lengths.sum(dtype=np.int64))

    def _map_tokens(self) -> None:
        size = self.bin_path.stat().st_size
        needed = self.num_tokens * self.dtype.itemsize
        if not needed:
            raise self._refusal(f"it is empty: {self.num_documents} documents hold 0 tokens")
        if size != needed:
            raise self._refusal(
                f"{self.bin_path.name} has {size} bytes and its index asks for {self.num_tokens} "
                f"tokens * {self.dtype.itemsize} bytes = {needed}: one of the two is truncated "
                f"or of another preparation"
            )
        # A plain ndarray over the mapping: slicing np.memmap itself costs microseconds.
        self.tokens = np.asarray(np.memmap(self.bin_path, mode="r", dtype=self.dtype))

    def document(self, index: int) -> np.ndarray:
        """Tokens of document ``index``, a view of the file."""
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.lengths[index])]

    @cached_property
    def description(self) -> dict[str, Any]:
        """What tools.prepare wrote beside the pair; empty for a pair of other origin."""
        path = Path(f"{self.prefix}.json")
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text()))
        except ValueError as error:
            raise self._refusal(f"{path.name} is not JSON ({error})") from error

    @cached_property
    def digest(self) -> str:
        """Names this corpus's content, for ledgers and cached indices."""
        return str(self.description.get("fingerprint") or fingerprint(self.prefix))

    def check(self, *, tokenizer_sha256: str = "") -> None:
        """Refuse a pair that changed since it was written, or of another tokenizer.

        Raises:
            ValueError: naming both digests.
        """
        written = self.description.get("fingerprint")
        found = fingerprint(self.prefix) if written else ""
        if written and written != found:
            raise self._refusal(
                f"it changed since it was indexed: fingerprint {found[:12]} now, "
                f"{str(written)[:12]} in {Path(self.prefix).name}.json; run tools.prepare again"
            )
        made_with = self.description.get("tokenizer_sha256")
        if tokenizer_sha256 and made_with and made_with != tokenizer_sha256:
            raise self._refusal(
                f"it was indexed with tokenizer {str(made_with)[:12]}, and data.tokenizer.path "
                f"is {tokenizer_sha256[:12]}: run tools.prepare again or name the other tokenizer"
            )


def fingerprint(prefix: str | Path) -> str:
    """A sha256 over sizes and content of a pair; large files give 64 blocks spread over them."""
    digest = hashlib.sha256()
    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
        size = path.stat().st_size
        digest.update(struct.pack("<Q", size))
        with open(path, "rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
                continue
            for block in range(64):
                file.seek((size - 2**20) * block // 63)
                digest.update(file.read(2**20))
    return digest.hexdigest()

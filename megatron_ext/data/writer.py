"""Writes a Megatron ``.bin``/``.idx`` pair whose bytes equal IndexedDatasetBuilder's."""

import os
import struct
import uuid
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megatron_ext.atomic import sync_folder
from megatron_ext.data.indexed import DTYPES, MAGIC

CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's choice: two bytes a token below 65,500 of them, else four."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class CorpusWriter:
    """Appends documents to ``<prefix>.bin`` and writes the index at the end.

    A context manager: both files appear under their names when it ends without an error, and
    neither does otherwise.
    """

    def __init__(self, prefix: str | Path, *, dtype: np.dtype | type[np.number]) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.lengths: list[np.ndarray] = []
        mark = f"{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self._aside = {
            end: self.prefix.with_name(f".{self.prefix.name}.{mark}.{end}")
            for end in ("bin", "idx")
        }
        self._bin = open(self._aside["bin"], "xb")  # noqa: SIM115, closed by __exit__

    def add_document(self, tokens: np.ndarray | list[int]) -> None:
        """Append one document."""
        self.add_documents(np.asarray(tokens), np.array([len(tokens)]))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append several documents: their tokens end to end, and each one's length."""
        assert int(lengths.sum()) == len(tokens)
        tokens.astype(self.dtype, copy=False).tofile(self._bin)
        self.lengths.append(lengths.astype(np.int32))

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._bin.close()
            for path in self._aside.values():
                path.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._bin.flush()
        os.fsync(self._bin.fileno())
        lengths = np.concatenate(self.lengths) if self.lengths else np.zeros(0, np.int32)
        with open(self._aside["idx"], "xb") as file:
            write_index(file, lengths, self.dtype)
            file.flush()
            os.fsync(file.fileno())
        self.prefix.with_name(self.prefix.name + ".json").unlink(missing_ok=True)
        os.replace(self._aside["bin"], f"{self.prefix}.bin")
        os.replace(self._aside["idx"], f"{self.prefix}.idx")
        sync_folder(self.prefix.parent)


def write_index(file: BinaryIO, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write an index of documents of one sequence each to an open binary ``file``."""
    ends = np.cumsum(lengths, dtype=np.int64)
    pointers = (ends - lengths) * dtype.itemsize
    file.write(MAGIC + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(lengths) + 1))
    for array in (lengths, pointers, np.arange(len(lengths) + 1, dtype=np.int64)):
        array.tofile(file)

"""Tokenizers of three kinds behind one interface, each known by the sha256 of its file.

Encoding is done in batches, by the fastest call of each library: one call a document is most of
what preparation by Megatron-LM's tool costs.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_ext.data.config import TokenizerConfig
from megatron_ext.legal import unknown_choice

ENDS = {".model": "sentencepiece", ".tiktoken": "tiktoken", ".json": "huggingface"}
"""Kind of tokenizer by the end of its file's name."""


class Tokenizer(ABC):
    """Text to token ids and back."""

    vocab_size: int
    """True size: ids are below it."""

    eod_id: int
    """Ends a document."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, and how many each has. No special token is added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""

    @abstractmethod
    def restores(self, text: str) -> bool:
        """Whether decoding its ids is bound to give back the very bytes of ``text``."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self.encode_batch([text])[0].tolist()


def load_tokenizer(source: TokenizerConfig | str | Path) -> Tokenizer:
    """Open a tokenizer by config, or by path, when its file name's end says the kind.

    Raises:
        ValueError: the file is missing, or of no known kind.
    """
    if isinstance(source, TokenizerConfig):
        path, kind = Path(source.path), source.kind
    else:
        path = Path(source)
        if path.is_dir() and (path / "tokenizer.json").is_file():
            path = path / "tokenizer.json"
        kind = ENDS.get(path.suffix, path.suffix)
    if kind not in KINDS:
        raise unknown_choice("data.tokenizer.kind", kind, KINDS)
    if not path.is_file():
        raise ValueError(
            f"data.tokenizer.path={path}: there is no such file; train one with "
            f"tools.train_tokenizer."
        )
    return KINDS[kind](path)


def joined(pieces: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids as one array and their lengths."""
    lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
    ids = np.empty(int(lengths.sum()), dtype=np.int32)
    at = 0
    for piece, length in zip(pieces, lengths.tolist()):
        ids[at : at + length] = piece
        at += length
    return ids, lengths


def _sentencepiece(path: Path) -> Tokenizer:
    from megatron_ext.data.tokenizer_kinds import SentencePieceTokenizer

    return SentencePieceTokenizer(path)


def _tiktoken(path: Path) -> Tokenizer:
    from megatron_ext.data.tokenizer_kinds import Arcade100kTokenizer

    return Arcade100kTokenizer(path)


def _huggingface(path: Path) -> Tokenizer:
    from megatron_ext.data.tokenizer_kinds import HuggingFaceTokenizer

    return HuggingFaceTokenizer(path)


KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "sentencepiece": _sentencepiece,
    "tiktoken": _tiktoken,
    "huggingface": _huggingface,
}

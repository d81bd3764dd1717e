"""The three tokenizer libraries, each imported only when a file of its kind is opened."""

import base64
import binascii
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ext.data.tokenizer import Tokenizer, joined

ARCADE_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""cl100k's split with one digit a piece, StableLM-2's change (data: section 4)."""

ARCADE_CODE_MARKS = (
    "gh_stars", "filename", "issue_start", "issue_comment", "issue_closed", "jupyter_start",
    "jupyter_text", "jupyter_code", "jupyter_output", "empty_output", "commit_before",
    "commit_msg", "commit_after", "reponame",
)  # fmt: skip
ARCADE_SPECIALS = (
    "endoftext", "fim_prefix", "fim_middle", "fim_suffix", "fim_pad", *ARCADE_CODE_MARKS,
    "endofprompt", "im_start", "im_end", "pause", *(f"reg{i}" for i in range(8)), "extra0",
)  # fmt: skip
"""In the order of their ids, from 100,257 on."""

CL100K_RANKS = 100_256
FIRST_SPECIAL = 100_257
BLANK_MARK = "\u2581"
EOD_NAMES = (
    "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)  # fmt: skip


class SentencePieceTokenizer(Tokenizer):
    """A ``.model`` file; the end of a document is its ``</s>``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import sentencepiece

        self.model = sentencepiece.SentencePieceProcessor()
        try:
            self.model.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"data.tokenizer.path={path} is not a SentencePiece model.") from error
        self.vocab_size, self.eod_id = self.model.vocab_size(), self.model.eos_id()
        pieces = (self.model.IdToPiece(i) for i in range(min(self.vocab_size, 600)))
        keeps_blanks = self.model.Decode(self.model.Encode("  a ")) == "  a "
        self._lossless = "<0x00>" in pieces and keeps_blanks

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts; one call a text, as lines are encoded faster than by its own pool."""
        return joined([self.model.EncodeAsIds(text) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        return self.model.DecodeIds([int(i) for i in ids])

    def restores(self, text: str) -> bool:
        """All text, but for the mark that SentencePiece puts in the place of blanks."""
        return self._lossless and BLANK_MARK not in text


class Arcade100kTokenizer(Tokenizer):
    """StableLM-2's Arcade100k over a file of cl100k ranks: NFC, single digits, own specials."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import tiktoken

        try:
            lines = (line.split() for line in path.read_bytes().splitlines() if line)
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"data.tokenizer.path={path} is not a tiktoken rank file.") from error
        if len(ranks) != CL100K_RANKS:
            raise ValueError(
                f"data.tokenizer.path={path} has {len(ranks)} ranks and Arcade100k's has "
                f"{CL100K_RANKS}: take cl100k_base.tiktoken."
            )
        specials = {f"<|{n}|>": FIRST_SPECIAL + i for i, n in enumerate(ARCADE_SPECIALS)}
        self.model = tiktoken.Encoding(
            "arcade100k",
            pat_str=ARCADE_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=specials,
        )
        self.vocab_size, self.eod_id = self.model.n_vocab, specials["<|endoftext|>"]

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, NFC first; text that spells a special token stays text."""
        encode = self.model.encode_to_numpy
        parts = [encode(self.normalised(text), disallowed_special=()) for text in texts]
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        return np.concatenate(parts).astype(np.int32), lengths

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become the replacement character."""
        return self.model.decode([int(i) for i in ids])

    @staticmethod
    def normalised(text: str) -> str:
        """What is encoded in the place of ``text``."""
        return unicodedata.normalize("NFC", text)

    def restores(self, text: str) -> bool:
        """Text that is in NFC already."""
        return unicodedata.is_normalized("NFC", text)


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``; the end of a document is the first known name among its specials."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import tokenizers

        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
            normalizer = json.loads(path.read_bytes()).get("normalizer")
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"data.tokenizer.path={path} is not a tokenizer.json.") from error
        self.model.no_truncation()
        self.model.no_padding()
        self.vocab_size = self.model.get_vocab_size(with_added_tokens=True)
        found = [self.model.token_to_id(name) for name in EOD_NAMES]
        known = [i for i in found if i is not None]
        if not known:
            raise ValueError(
                f"data.tokenizer.path={path} has none of {', '.join(EOD_NAMES)} to end documents."
            )
        self.eod_id = known[0]
        byte_level = type(self.model.decoder).__name__ == "ByteLevel"
        self._lossless = byte_level and normalizer is None

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, by the call that leaves offsets out."""
        batch = self.model.encode_batch_fast(list(texts), add_special_tokens=False)
        return joined([encoding.ids for encoding in batch])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        return self.model.decode([int(i) for i in ids], skip_special_tokens=False)

    def restores(self, text: str) -> bool:
        """All text, when bytes are the alphabet and nothing is normalised."""
        return self._lossless

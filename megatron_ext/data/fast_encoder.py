"""Encodes by GigaToken where it is installed and gives the very ids of the tokenizer's library.

It is an optional extra, several times faster than each library. It is trusted only as far as it is
checked: on a set of difficult texts before it is used, and on a piece of every batch while it is.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_ext.data.corpus import shipped
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.tokenizer_kinds import (
    Arcade100kTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
)

log = logging.getLogger(__name__)

CHECKED_CHARACTERS = 1000
"""Of every batch of about a million: 0.1 % is encoded twice."""

DIFFICULT = (
    "",
    " ",
    "   leading and trailing   ",
    "\t\ttabs\tand  double  blanks\r\nlines\n\n\n\nend\n",
    "12345 007 3.14159 1,000,000 2024-01-01 x86_64",
    "it's WE'RE I'M they'll don't 'twas",
    "full-width \uff0c\u3002\uff11\uff12\uff13 \u3000 blanks",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u722c\u5c71\u3002" * 5,
    "e\u0301 \u00e9 \u1e9b\u0323 \ufb01 \u2126 \u212b",
    "\U0001f600\U0001f469\u200d\U0001f4bb\U0001f1e8\U0001f1f3 emoji",
    "\u0627\u0644\u0633\u0644\u0627\u0645 \u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\x00\x01\x7f\u2028\u2029\ufeff\u200b control",
    "a" * 3000,
    "=" * 500 + " " * 500 + "\n" * 100,
    "\u2581 mark \u2581\u2581",
    "<s> </s> <unk> <0x41> <|endoftext|> <|im_start|>",
    "https://example.org/a?b=c&d=%20#e {'json': [1, 2, {}]} \\n \\u0041",
)


class FastEncoder(Tokenizer):
    """A tokenizer whose batches go through GigaToken; everything else is its own."""

    def __init__(self, slow: Tokenizer, engine: Any, specials: Sequence[str]) -> None:
        self.slow, self._engine, self._specials = slow, engine, tuple(specials)
        self.path, self.sha256 = slow.path, slow.sha256
        self.vocab_size, self.eod_id = slow.vocab_size, slow.eod_id
        self._prepare: Callable[[str], str] = str
        if isinstance(slow, Arcade100kTokenizer):
            self._prepare = slow.normalised

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        return self.slow.decode(ids)

    def restores(self, text: str) -> bool:
        """As the tokenizer itself."""
        return self.slow.restores(text)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and lengths, equal to the library's.

        Texts that spell a special token are left to the library: each has its own rules for them.
        """
        if any(special in text for text in texts for special in self._specials):
            return self._mixed(texts)
        piece = next((text[:CHECKED_CHARACTERS] for text in texts if text), "")
        ids, lengths = self._fast([piece, *texts])
        checked = int(lengths[0])
        if not np.array_equal(ids[:checked], self.slow.encode_batch([piece])[0]):
            log.warning("GigaToken differs from %s on %r: it is not used", self.path.name, piece)
            return self.slow.encode_batch(texts)
        return ids[checked:], lengths[1:]

    def _mixed(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts, run = [], list[str]()
        for text in texts:
            if any(special in text for special in self._specials):
                parts += [self.encode_batch(run)] if run else []
                parts.append(self.slow.encode_batch([text]))
                run = []
            else:
                run.append(text)
        parts += [self.encode_batch(run)] if run else []
        ids, lengths = zip(*parts)
        return np.concatenate(ids), np.concatenate(lengths)

    def _fast(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._engine.encode_batch([self._prepare(t) for t in texts], parallel=False)
        offsets = np.asarray(encoded.layout.offsets.data)
        return np.asarray(encoded.layout.content.data).astype(np.int32), np.diff(offsets)

    def agrees(self) -> bool:
        """Whether it gives the library's ids on difficult texts and on the shipped corpus."""
        texts = [*DIFFICULT, *(document.text for document in shipped.documents())]
        texts = [text for text in texts if not any(s in text for s in self._specials)]
        fast, slow = self._fast(texts), self.slow.encode_batch(texts)
        return all(np.array_equal(one, other) for one, other in zip(fast, slow))


def fastest(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer over GigaToken if that is installed, can read it and agrees with it."""
    try:
        import gigatoken  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return tokenizer
    try:
        engine, specials = _open(gigatoken, tokenizer)
        fast = FastEncoder(tokenizer, engine, specials)
        agrees = fast.agrees()
    except Exception as error:  # whatever a foreign engine finds wrong, the library still works
        log.warning("GigaToken cannot take %s (%s): it is not used", tokenizer.path.name, error)
        return tokenizer
    if not agrees:
        log.warning("GigaToken gives other ids than %s: it is not used", tokenizer.path.name)
        return tokenizer
    return fast


def _open(gigatoken: Any, tokenizer: Tokenizer) -> tuple[Any, list[str]]:
    content = tokenizer.path.read_bytes()
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = tokenizer.model
        special = [i for i in range(model.vocab_size()) if model.IsControl(i) or model.IsUnknown(i)]
        names = [model.IdToPiece(i) for i in special]
        return gigatoken.Tokenizer.from_sentencepiece(content), names
    if isinstance(tokenizer, HuggingFaceTokenizer):
        added = tokenizer.model.get_added_tokens_decoder().values()
        return gigatoken.Tokenizer.from_json(content), [token.content for token in added]
    assert isinstance(tokenizer, Arcade100kTokenizer)
    # Qwen2's split is the same expression: cl100k's with one digit a piece.
    engine = gigatoken.Tokenizer.from_tiktoken(str(tokenizer.path), pretokenizer="qwen2")
    return engine, []

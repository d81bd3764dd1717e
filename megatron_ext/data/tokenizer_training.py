"""Trains a SentencePiece BPE tokenizer by Yi's rules (arXiv:2403.04652, section 2.2).

Digits are split one by one, characters outside the vocabulary fall back to bytes, text is not
normalised, and no blank is put before it. Runs of blanks stay as they are, for code.
"""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_ext.atomic import write_bytes

LONGEST_PIECE_OF_TEXT = 4000
"""Bytes. SentencePiece passes over longer lines; documents are cut at line ends to stay below."""


def train_tokenizer(
    texts: Iterable[str],
    path: Path,
    *,
    vocab_size: int,
    character_coverage: float = 0.9999,
    sample_bytes: int = 30_000_000,
    seed: int = 0,
) -> int:
    """Write a ``.model`` trained on a sample of ``texts``; return its true vocabulary size.

    The same texts, size and seed give the same file. A text too small for the vocabulary asked
    for gives the largest it can.
    """
    import io

    import sentencepiece

    pieces = sampled(pieces_of(texts), sample_bytes=sample_bytes, seed=seed)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * LONGEST_PIECE_OF_TEXT,
            shuffle_input_sentence=False,
            num_threads=1,  # is written into the file, and BPE hardly gains by more
            train_extremely_large_corpus=False,
            minloglevel=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
        )
    except RuntimeError as error:
        raise ValueError(
            f"--vocab-size={vocab_size} cannot be trained on {sum(map(len, pieces))} characters "
            f"of text ({str(error).splitlines()[-1].strip()}): give more text or another size."
        ) from error
    write_bytes(path, model.getvalue())
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.getvalue())
    return processor.vocab_size()


def pieces_of(texts: Iterable[str]) -> Iterator[str]:
    """Texts as lines, the line ends kept as text of their own in runs of short lines."""
    for text in texts:
        held: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), LONGEST_PIECE_OF_TEXT):
                part = line[start : start + LONGEST_PIECE_OF_TEXT]
                if held and size + len(part) > LONGEST_PIECE_OF_TEXT:
                    yield "".join(held)
                    held, size = [], 0
                held.append(part)
                size += len(part)
        if held:
            yield "".join(held)


def sampled(pieces: Iterable[str], *, sample_bytes: int, seed: int) -> list[str]:
    """All pieces, or a random sample of about ``sample_bytes`` of them, in their order."""
    kept = [piece for piece in pieces if piece.strip()]
    total = sum(len(piece.encode()) for piece in kept)
    if total <= sample_bytes:
        return kept
    draw = random.Random(seed)
    return [piece for piece in kept if draw.random() < sample_bytes / total]

"""From text to an indexed corpus: chunks of files are encoded by forked workers, in order."""

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.documents import Chunk, Reading, chunks_of, read_documents
from megatron_ext.data.indexed import IndexedCorpus
from megatron_ext.data.sidecar import describe
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.writer import CorpusWriter, token_dtype

NO_PROMISE = bytes(8)
"""In the place of a checksum: the tokenizer is known not to restore this text."""

CHUNK_BYTES = 4 * 2**20
BATCH_CHARACTERS = 2**20
"""Text given to the tokenizer at a time: bounds memory, and is far above any call's overhead."""


@dataclass(frozen=True)
class Preparation:
    """How a corpus is prepared."""

    tokenizer: Tokenizer
    reading: Reading
    workers: int = 1
    append_eod: bool = True
    min_tokens: int = 0
    max_tokens: int = 0
    """Bounds on documents, their end not counted; 0 is none. Long documents kept as a corpus of
    their own can be given a larger share of a phase's mixture."""

    check: bool = False
    """Decode what was written and compare it with the text, document by document."""


@dataclass(frozen=True)
class Encoded:
    """What one worker made of one chunk."""

    ids: np.ndarray
    lengths: np.ndarray
    sums: bytes
    reading: Reading
    bytes_read: int


def prepare_corpus(
    inputs: Sequence[Path],
    prefix: Path,
    how: Preparation,
    *,
    domain: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Write ``<prefix>.bin``, ``.idx`` and ``.json`` from ``inputs``; return the description.

    Raises:
        ValueError: a line is bad and the policy is to stop, or no document is left, or a check
            found text that does not come back.
    """
    dtype, sums = token_dtype(how.tokenizer.vocab_size), []
    digest = source_digest(inputs, how)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with CorpusWriter(prefix, dtype=dtype) as writer:
        with _workers(how) as each:
            chunks = chunks_of(list(inputs), chunk_bytes=CHUNK_BYTES)
            for encoded in each(encode_chunk, chunks):
                writer.add_documents(encoded.ids, encoded.lengths)
                how.reading.add(encoded.reading)
                sums.append(encoded.sums)
                progress(encoded.bytes_read)
        if not any(len(lengths) for lengths in writer.lengths):
            raise ValueError(
                f"{', '.join(map(str, inputs))}: no document to index; left out as bad: "
                f"{dict(how.reading.counts) or 'none'}."
            )
    facts: dict[str, Any] = {
        "tokenizer_sha256": how.tokenizer.sha256,
        "tokenizer": how.tokenizer.path.name,
        "vocab_size": how.tokenizer.vocab_size,
        "domain": domain or prefix.name,
        "append_eod": how.append_eod,
        "source_digest": digest,
        "left_out": dict(sorted(how.reading.counts.items())),
    }
    if how.check:
        try:
            facts["documents_not_restored"] = check_documents(prefix, b"".join(sums), how)
        except ValueError:
            for end in ("bin", "idx"):
                Path(f"{prefix}.{end}").unlink()
            raise
    return describe(prefix, **facts)


def source_digest(inputs: Sequence[Path], how: Preparation) -> str:
    """Names the input's content and all that decides what is made of it."""
    digest = hashlib.sha256()
    for path in inputs:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    settings: list = [how.tokenizer.sha256, how.append_eod, how.reading.key]
    if how.min_tokens or how.max_tokens:
        settings += [how.min_tokens, how.max_tokens]
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()


def is_up_to_date(prefix: Path, inputs: Sequence[Path], how: Preparation) -> bool:
    """Whether the pair at ``prefix`` is whole and is what preparing ``inputs`` would write."""
    try:
        corpus = IndexedCorpus(prefix)
        corpus.check()
    except ValueError:
        return False
    return corpus.description.get("source_digest") == source_digest(inputs, how)


class _Forked:
    """What forked workers inherit: a tokenizer must not go through a pipe with every chunk."""

    how: Preparation
    corpus: IndexedCorpus
    sums: bytes


@contextmanager
def _workers(how: Preparation) -> Iterator[Callable]:
    """An ordered map over this process or over forked ones, which share what is loaded."""
    _Forked.how = how
    if how.workers == 1:
        yield map
        return
    with multiprocessing.get_context("fork").Pool(how.workers) as pool:
        yield pool.imap
        # Workers leave by themselves: ended by signal, one could be replaced while it is joined.
        pool.close()
        pool.join()


def encode_chunk(chunk: Chunk) -> Encoded:
    """Read and encode one chunk."""
    how = _Forked.how
    reading = replace(how.reading, counts=type(how.reading.counts)(), named=[])
    documents = read_documents(
        chunk.path, reading, start=chunk.start, stop=chunk.stop, first_line=chunk.first_line
    )
    ids, lengths, sums = [], [], []
    for texts in _batches(text for _, text in documents):
        batch_ids, batch_lengths = how.tokenizer.encode_batch(texts)
        ids.append(batch_ids)
        lengths.append(batch_lengths)
        if how.check:
            restores = how.tokenizer.restores
            sums += [_checksum(text) if restores(text) else NO_PROMISE for text in texts]
    all_ids = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    all_lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    kept = all_lengths >= how.min_tokens
    if how.max_tokens:
        kept &= all_lengths <= how.max_tokens
    if not kept.all():
        all_ids, all_lengths = all_ids[np.repeat(kept, all_lengths)], all_lengths[kept]
        sums = [one for one, keep in zip(sums, kept) if keep]
    if how.append_eod:
        all_ids, all_lengths = with_eod(all_ids, all_lengths, how.tokenizer.eod_id)
    return Encoded(
        ids=all_ids.astype(token_dtype(how.tokenizer.vocab_size)),
        lengths=all_lengths,
        sums=b"".join(sums),
        reading=reading,
        bytes_read=chunk.stop - chunk.start,
    )


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    held, size = list[str](), 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held


def with_eod(ids: np.ndarray, lengths: np.ndarray, eod_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The documents with ``eod_id`` after each."""
    longer = lengths + 1
    ends = np.cumsum(longer) - 1
    out = np.empty(len(ids) + len(lengths), dtype=ids.dtype)
    text = np.ones(len(out), dtype=bool)
    text[ends] = False
    out[ends], out[text] = eod_id, ids
    return out, longer


def _checksum(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def check_documents(prefix: Path, sums: bytes, how: Preparation) -> int:
    """Decode every written document and compare with its text.

    Returns:
        How many the tokenizer is known not to restore.

    Raises:
        ValueError: another does not come back.
    """
    corpus = IndexedCorpus(prefix)
    assert len(sums) == 8 * corpus.num_documents
    size = 2000
    spans = [(i, min(i + size, corpus.num_documents)) for i in range(0, corpus.num_documents, size)]
    _Forked.corpus, _Forked.sums = corpus, sums
    with _workers(how) as each:
        found = list(each(_changed, spans))
    changed = [number for numbers, _ in found for number in numbers]
    if changed:
        raise ValueError(
            f"{prefix}: {len(changed)} of {corpus.num_documents} documents do not decode to their "
            f"text (the first is number {changed[0]}), which {how.tokenizer.path.name} should "
            f"restore: report this with the document."
        )
    return sum(unpromised for _, unpromised in found)


def _changed(span: tuple[int, int]) -> tuple[list[int], int]:
    how, corpus, sums = _Forked.how, _Forked.corpus, _Forked.sums
    changed, unpromised = [], 0
    for number in range(*span):
        wanted = sums[8 * number : 8 * number + 8]
        if wanted == NO_PROMISE:
            unpromised += 1
            continue
        ids = corpus.document(number).tolist()
        if _checksum(how.tokenizer.decode(ids[:-1] if how.append_eod else ids)) != wanted:
            changed.append(number)
    return changed, unpromised

"""The .bin/.idx pair: Megatron's bytes, and refusal of what is not whole."""

import numpy as np
import pytest

from megatron_ext.data.indexed import IndexedCorpus
from megatron_ext.data.writer import CorpusWriter, token_dtype

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


def _write(prefix, dtype=np.uint16):
    with CorpusWriter(prefix, dtype=dtype) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)


@pytest.mark.filterwarnings("ignore")  # of megatron's and torch's own imports
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_bytes_equal_those_of_megatrons_builder(tmp_path, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    _write(tmp_path / "ours", dtype)
    for end in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{who}.{end}" for who in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert [read[i].tolist() for i in range(len(read))] == DOCUMENTS


def test_documents_come_back(tmp_path):
    _write(tmp_path / "c")
    corpus = IndexedCorpus(tmp_path / "c")
    assert [corpus.document(i).tolist() for i in range(3)] == DOCUMENTS
    assert corpus.num_tokens == 8


@pytest.mark.filterwarnings("ignore")
def test_documents_of_several_sequences_are_joined(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3]), [1, 2])
    builder.add_document(torch.tensor([4, 5]), [2])
    builder.finalize(str(tmp_path / "c.idx"))
    corpus = IndexedCorpus(tmp_path / "c")
    assert [corpus.document(i).tolist() for i in range(2)] == [[1, 2, 3], [4, 5]]


def test_nothing_is_left_when_writing_fails(tmp_path):
    with pytest.raises(RuntimeError), CorpusWriter(tmp_path / "c", dtype=np.int32) as writer:
        writer.add_document([1, 2])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_missing_pair_is_refused_by_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"data.sources.wiki.path=.*c.idx is missing"):
        IndexedCorpus(tmp_path / "c", key="data.sources.wiki.path")


def test_truncated_tokens_are_refused_with_the_arithmetic(tmp_path):
    _write(tmp_path / "c")
    whole = (tmp_path / "c.bin").read_bytes()
    (tmp_path / "c.bin").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=r"has 13 bytes .* 8 tokens \* 2 bytes = 16"):
        IndexedCorpus(tmp_path / "c")


def test_truncated_index_is_refused(tmp_path):
    _write(tmp_path / "c")
    whole = (tmp_path / "c.idx").read_bytes()
    for size in (20, len(whole) - 1):
        (tmp_path / "c.idx").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"truncated|does not begin"):
            IndexedCorpus(tmp_path / "c")


def test_empty_corpus_is_refused(tmp_path):
    with CorpusWriter(tmp_path / "c", dtype=np.int32):
        pass
    with pytest.raises(ValueError, match="empty: 0 documents"):
        IndexedCorpus(tmp_path / "c")
    for end in ("bin", "idx"):
        (tmp_path / f"c.{end}").write_bytes(b"")
    with pytest.raises(ValueError, match=r"c.idx is empty \(0 bytes\)"):
        IndexedCorpus(tmp_path / "c")


def test_changed_corpus_is_refused(tmp_path, write_corpus):
    from megatron_ext.data.sidecar import describe

    write_corpus(tmp_path / "c", documents=20, seed=0)
    describe(tmp_path / "c", tokenizer_sha256="ab" * 32)
    IndexedCorpus(tmp_path / "c").check(tokenizer_sha256="ab" * 32)
    content = bytearray((tmp_path / "c.bin").read_bytes())
    content[17] ^= 1
    (tmp_path / "c.bin").write_bytes(content)
    with pytest.raises(ValueError, match="changed since it was indexed"):
        IndexedCorpus(tmp_path / "c").check()


def test_corpus_of_another_tokenizer_is_refused(tmp_path, write_corpus):
    from megatron_ext.data.sidecar import describe

    write_corpus(tmp_path / "c", documents=20, seed=0)
    describe(tmp_path / "c", tokenizer_sha256="ab" * 32)
    with pytest.raises(ValueError, match=r"tokenizer abababababab.*cdcdcdcdcdcd"):
        IndexedCorpus(tmp_path / "c").check(tokenizer_sha256="cd" * 32)


def test_two_bytes_a_token_below_megatrons_limit():
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32

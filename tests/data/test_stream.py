"""The token stream: every document once an epoch, whatever it is read in."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_ext.data.epoch import document_order, sort_even
from megatron_ext.data.stream import TokenStream
from megatron_ext.jit import compiled
from tools.build_indices import build


def _read(stream, offset, size):
    out = np.empty(size, dtype=np.int64)
    return out, stream.read(offset, out)


def test_an_epoch_holds_every_token_once(tmp_path, write_corpus):
    corpus = write_corpus(tmp_path / "c", documents=200, seed=1)
    stream = TokenStream(corpus, seed=7)
    for epoch in range(3):
        tokens, ends = _read(stream, epoch * corpus.num_tokens, corpus.num_tokens)
        assert sorted(tokens.tolist()) == list(range(corpus.num_tokens))
        assert len(ends) == 200 and ends[-1] == corpus.num_tokens


def test_epochs_differ_and_repeat_by_seed(tmp_path, write_corpus):
    corpus = write_corpus(tmp_path / "c", documents=200, seed=1)
    size = corpus.num_tokens
    first, _ = _read(TokenStream(corpus, seed=7), 0, 2 * size)
    again, _ = _read(TokenStream(corpus, seed=7), 0, 2 * size)
    other, _ = _read(TokenStream(corpus, seed=8), 0, size)
    assert np.array_equal(first, again)
    assert not np.array_equal(first[:size], first[size:])
    assert not np.array_equal(first[:size], other)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_pieces_of_any_size_are_the_same_stream(tmp_path, size, write_corpus):
    corpus = write_corpus(tmp_path / "c", documents=50, seed=2)
    stream = TokenStream(corpus, seed=3)
    total = 3 * corpus.num_tokens // size * size
    whole, whole_ends = _read(stream, 0, total)
    ends = []
    for offset in range(0, total, size):
        piece, piece_ends = _read(stream, offset, size)
        assert np.array_equal(piece, whole[offset : offset + size])
        ends += [offset + end for end in piece_ends]
    assert ends == whole_ends
    for offset in range(0, total, max(size, 13)):
        assert stream.documents_before(offset) == sum(end <= offset for end in whole_ends)


def test_document_order_is_fixed_for_good():
    assert document_order(8, seed=(1, 2, 3)).tolist() == ORDER


@pytest.mark.parametrize("count", [1, 2, 1000, 65_535, 200_000])
def test_document_order_is_a_fair_permutation(count):
    order = document_order(count, seed=(5,))
    assert np.array_equal(np.sort(order), np.arange(count))
    if count > 1000:  # neither place nor neighbour tells anything of a document
        place = np.arange(count)
        assert abs(np.corrcoef(place, order)[0, 1]) < 5 / count**0.5
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / count**0.5


@pytest.mark.parametrize("count", [0, 1, 2, 4097, 300_000])
@pytest.mark.parametrize("spread", [2**63, 2**41, 300])
def test_even_sort_sorts_what_is_not_even_too(count, spread):
    count = min(count, 5000) if spread < 2**63 else count  # insertion alone sorts equal upper bits
    keys = np.random.default_rng(count).integers(0, spread, count).astype(np.uint64)
    keys[: count // 4] += np.uint64(2**63)
    want = np.sort(keys)
    compiled(sort_even)(keys, np.empty_like(keys))
    assert np.array_equal(keys, want)


def test_an_order_is_the_sorted_random_numbers():
    count, bits = 100_000, np.uint64(17)
    raw = np.random.PCG64(np.random.SeedSequence((7, 8))).random_raw(count)
    want = np.argsort(((raw >> bits) << bits) | np.arange(count, dtype=np.uint64))
    assert np.array_equal(document_order(count, seed=(7, 8)), want)


ORDER = [1, 3, 7, 5, 2, 0, 4, 6]


def test_cached_epoch_equals_a_built_one_and_damage_is_rebuilt(tmp_path, write_corpus):
    corpus = write_corpus(tmp_path / "c", documents=50, seed=2)
    want, _ = _read(TokenStream(corpus, seed=3), 0, 500)
    cache = tmp_path / "cache"
    for _ in range(2):
        got, _ = _read(TokenStream(corpus, seed=3, cache=cache), 0, 500)
        assert np.array_equal(got, want)
        (file,) = cache.glob("*.npy")
        file.write_bytes(file.read_bytes()[:-8] + b"\0" * 8)


def test_orders_built_ahead_are_the_ones_a_run_takes(tmp_path, write_corpus):
    corpus = write_corpus(tmp_path / "c", documents=50, seed=2)
    source = SimpleNamespace(path=str(tmp_path / "c"))
    cache = tmp_path / "cache"
    data = SimpleNamespace(sources={"web": source}, index_cache=str(cache))
    build(SimpleNamespace(seed=3, data=data), 2)
    held = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(held) == 4  # two epochs, each with its checksum
    stream = TokenStream(corpus, seed=3, name="web", cache=cache)
    _read(stream, 0, 2 * corpus.num_tokens)
    assert held == {file: file.stat().st_mtime_ns for file in cache.iterdir()}

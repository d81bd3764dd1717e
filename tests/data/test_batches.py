"""Accounts for every document while everything about a run changes under it."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from megatron_ext.data.batches import PhaseBatches, collate
from megatron_ext.data.held_out import HeldOut


@dataclass
class Stretch:
    tokens: int
    seq_length: int
    mixture: dict = field(default_factory=dict)
    mixture_end: dict = field(default_factory=dict)
    ramp_power: float = 1.0
    packing: str = "crossdoc"


@pytest.fixture
def sources(tmp_path, write_corpus):
    return {
        name: write_corpus(tmp_path / name, documents=n, seed=n, first=first)
        for name, n, first in (("a", 300, 0), ("b", 120, 100_000), ("c", 80, 200_000))
    }


# Each stretch: sources in use, mixture, end of a ramp, sequence length, (batch, ranks) per step.
STRETCHES = [
    (("a", "b"), {"a": 0.7, "b": 0.3}, {}, 32, [(4, 2)] * 5 + [(8, 4)] * 3),
    (("a", "b"), {"a": 0.3, "b": 0.7}, {"a": 0.8, "b": 0.2}, 48, [(6, 1)] * 7 + [(6, 3)] * 2),
    (("a", "b", "c"), {"a": 0.2, "c": 0.8}, {}, 16, [(12, 4)] * 9),
    (("a", "b", "c"), {}, {}, 100, [(2, 2), (4, 1), (6, 2)] * 3),
]


def _consume(sources, stretches=STRETCHES):
    """Run the stretches; return the inputs read of each source, in order, and the ledger."""
    ledger, read = {}, {name: [] for name in sources}
    for names, mixture, mixture_end, seq_length, steps in stretches:
        samples = sum(batch for batch, _ in steps)
        stretch = Stretch(samples * seq_length, seq_length, mixture, mixture_end)
        batches = PhaseBatches(stretch, {n: sources[n] for n in names}, ledger, seed=5)
        done, windows = 0, {}
        for batch, ranks in steps:
            for rank in range(ranks):  # each rank takes its own slice of the step, by number
                for k in range(done + rank * batch // ranks, done + (rank + 1) * batch // ranks):
                    windows[k] = batches.sample(k)
            done += batch
        for k in range(done):
            read[windows[k].source].append(windows[k].tokens)
        ledger = batches.ledger_at(done)
    return read, ledger


def test_nothing_is_repeated_or_skipped_while_everything_changes(sources):
    read, ledger = _consume(sources)
    for name, corpus in sources.items():
        consumed = np.concatenate([window[:-1] for window in read[name]])
        assert ledger[name]["tokens"] == len(consumed)
        times = Counter(consumed.tolist())
        whole, rest = divmod(len(consumed), corpus.num_tokens)
        assert sum(times.values()) == len(consumed)
        assert set(times.values()) <= {whole, whole + 1}
        assert sum(count == whole + 1 for count in times.values()) == rest


BEFORE = (("a", "b"), {"a": 0.7, "b": 0.3}, {}, 32, [(4, 2)] * 60)
"""7,680 tokens: more than one epoch of the smaller source."""


@pytest.mark.parametrize(
    "after",
    [
        pytest.param((*BEFORE[:1], {"a": 0.2, "b": 0.8}, *BEFORE[2:]), id="mixture"),
        pytest.param((*BEFORE[:4], [(12, 2)] * 25), id="batch"),
        pytest.param((*BEFORE[:3], 50, BEFORE[4]), id="sequence length"),
        pytest.param((*BEFORE[:4], [(4, 1), (4, 4)] * 30), id="world size"),
        pytest.param((("a", "b", "c"), {"a": 0.4, "b": 0.2, "c": 0.4}, *BEFORE[2:]), id="source"),
    ],
)
def test_one_change_mid_run_repeats_and_skips_no_document(sources, after):
    read, ledger = _consume(sources, [BEFORE, after])
    assert {name for name, windows in read.items() if windows} == set(after[0])
    for name in after[0]:
        corpus = sources[name]
        consumed = np.concatenate([window[:-1] for window in read[name]])
        document = np.searchsorted(corpus.starts, consumed - corpus.tokens[0], "right") - 1
        times = np.bincount(document, minlength=corpus.num_documents) / corpus.lengths
        epochs = len(consumed) // corpus.num_tokens
        cut = (times > epochs) & (times < epochs + 1)  # the document that is being read
        assert cut.sum() <= 1
        assert set(times[~cut].tolist()) <= {epochs, epochs + 1}
        assert ledger[name]["documents"] == np.floor(times).sum()


def test_each_window_ends_with_the_first_token_of_the_next(sources):
    read, _ = _consume(sources)
    for windows in read.values():
        for one, next_one in pairwise(windows):
            assert one[-1] == next_one[0]


def test_ledger_counts_whole_documents(sources):
    read, ledger = _consume(sources)
    for name, corpus in sources.items():
        last = corpus.starts + corpus.lengths - 1
        consumed = np.concatenate([window[:-1] for window in read[name]])
        ends = np.isin(consumed - consumed.min(), last).sum()
        assert ledger[name]["documents"] == ends
        assert ledger[name]["epochs"] == pytest.approx(len(consumed) / corpus.num_tokens, abs=1e-6)


def test_resuming_in_the_middle_needs_only_the_number(sources):
    stretch = Stretch(3200, 32, {"a": 0.5, "b": 0.25, "c": 0.25})
    once = PhaseBatches(stretch, sources, {}, seed=5)
    for k in range(100):
        once.sample(k)
    again = PhaseBatches(stretch, sources, {}, seed=5)
    for k in (99, 40):
        assert np.array_equal(again.sample(k).tokens, once.sample(k).tokens)


def test_a_ramp_is_read_on_at_the_share_it_has_reached(sources):
    stretch = Stretch(32 * 1000, 32, {"a": 1.0}, {"b": 1.0}, ramp_power=3.0)
    ledger = PhaseBatches(stretch, sources, {}, seed=5).ledger_at(400)
    rest = PhaseBatches(stretch, sources, ledger, seed=5, begun=400 * 32)
    want = PhaseBatches(stretch, sources, {}, seed=5).ledger_at(1000)
    got = rest.ledger_at(600)
    for name in ("a", "b"):
        assert got[name]["tokens"] == pytest.approx(want[name]["tokens"], abs=2 * 32)


def test_skipped_windows_are_counted_as_consumed(sources):
    stretch = Stretch(3200, 32, {"a": 0.5, "b": 0.5})
    batches = PhaseBatches(stretch, sources, {}, seed=5, skipped=[(10, 30), (50, 60)])
    ledger = batches.ledger_at(55)
    assert sum(line["skipped_windows"] for line in ledger.values()) == 25
    assert sum(line["tokens"] for line in ledger.values()) == 55 * 32


def test_a_source_with_other_text_under_the_same_name_is_refused(sources):
    stretch = Stretch(3200, 32, {"a": 1.0})
    ledger = PhaseBatches(stretch, sources, {}, seed=5).ledger_at(10)
    with pytest.raises(ValueError, match=r"data.sources.a.path=.*320 tokens already"):
        PhaseBatches(stretch, {"a": sources["b"]}, ledger, seed=5)


def test_document_packing_resets_positions_and_marks_documents():
    windows = np.arange(18).reshape(2, 9)
    batch = collate(windows, [[3, 8], [9]], packing="document")
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], list(range(8))]
    assert batch["cu_seqlens"].tolist() == [0, 3, 8, 16]
    assert batch["loss_mask"].tolist() == [[1, 1, 0, 1, 1, 1, 1, 0], [1] * 8]
    assert batch["labels"].tolist() == windows[:, 1:].tolist()


def test_crossdoc_packing_scores_every_token():
    batch = collate(np.arange(18).reshape(2, 9), [[3, 8], [9]], packing="crossdoc")
    assert batch["loss_mask"].min() == 1
    assert batch["cu_seqlens"] is None
    assert batch["position_ids"].tolist() == [list(range(8))] * 2


def test_validation_predicts_each_token_once(sources):
    corpus = sources["c"]
    held_out = HeldOut(corpus, seq_length=50, tokens=10**9)
    batch = held_out.micro_batch(range(held_out.num_samples + 1))
    scored = batch["labels"][batch["loss_mask"] > 0]
    assert scored.tolist() == list(range(200_001, 200_000 + corpus.num_tokens))

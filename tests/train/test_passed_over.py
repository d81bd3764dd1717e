"""Samples that were passed over stay so, and nothing else is once they are counted anew."""

from pathlib import Path

import numpy as np
import torch

from megatron_ext.config import RunConfig
from megatron_ext.data.config import SourceConfig
from megatron_ext.data.indexed import IndexedCorpus
from megatron_ext.data.writer import CorpusWriter
from megatron_ext.resilience.config import WatchConfig
from megatron_ext.train.config import PhaseConfig
from megatron_ext.train.feed import Feed
from megatron_ext.train.numerics import Numerics
from megatron_ext.train.phases import Plan
from megatron_ext.train.saving import changes_feeding, numbering
from megatron_ext.train.sources import open_phase
from megatron_ext.train.state import TrainState
from tests.train.test_phases import run

BATCH, LENGTH = 4, 16


def _job(folder: Path, mixture: dict[str, float]) -> tuple[RunConfig, dict[str, IndexedCorpus]]:
    """A run over two corpora in which no token is there twice."""
    job = run(PhaseConfig(tokens=40 * BATCH * LENGTH, mixture=mixture))
    for number, name in enumerate("ab"):
        if not (folder / f"{name}.bin").exists():
            with CorpusWriter(folder / name, dtype=np.uint16) as writer:
                for k in range(100):
                    writer.add_document(np.arange(100) + 100 * k + 20_000 * number)
    job.data.sources = {name: SourceConfig(path=str(folder / name)) for name in "ab"}
    return job, {name: IndexedCorpus(folder / name) for name in "ab"}


def _attempt(
    job: RunConfig,
    corpora: dict[str, IndexedCorpus],
    folder: Path,
    state: TrainState,
    *,
    steps: int,
) -> list[int]:
    """Take steps as the trainer does, the one at sample 24 bad; returns the inputs trained on."""
    numerics, phase = Numerics(WatchConfig(), folder, rank=0), Plan.of(job).phases[0]
    bad = not numerics._past
    state.numbering = numbering(job, state)
    read: list[int] = []
    for _ in range(steps):
        numerics.replay(state)
        if bad and state.phase_samples == 24:
            numerics.skip(state, 24 + BATCH)
        samples = open_phase(job, phase, corpora, state)
        for k in range(state.phase_samples, state.phase_samples + BATCH):
            read += samples.sample(k).tokens[:-1].tolist()
        state.phase_samples += BATCH
        state.phase_tokens += BATCH * LENGTH
    state.consumed = open_phase(job, phase, corpora, state).ledger_at(state.phase_samples)
    return read


def test_after_a_change_of_mixture_nothing_is_skipped_or_repeated(tmp_path: Path) -> None:
    job, corpora = _job(tmp_path, {"a": 0.5, "b": 0.5})
    state = TrainState()
    before = _attempt(job, corpora, tmp_path, state, steps=10)
    assert [(s["first"], s["past"]) for s in state.skipped] == [(24, 28)]
    stored = {"phases": [{**vars(job.phases[0])}], "batch": vars(job.batch)}
    stored["data"] = {"sources": dict(job.data.sources)}
    job, corpora = _job(tmp_path, {"a": 0.7, "b": 0.3})
    assert changes_feeding(stored, job, 0)
    state.rebase()
    after = _attempt(job, corpora, tmp_path, state, steps=20)
    assert state.skipped == []
    assert state.phase_samples == 20 * BATCH
    everything = before + after
    assert len(set(everything)) == len(everything) == 30 * BATCH * LENGTH
    ledger = state.consumed
    assert sum(line["tokens"] for line in ledger.values()) == 31 * BATCH * LENGTH
    assert sum(line["skipped_windows"] for line in ledger.values()) == BATCH


def test_a_later_attempt_at_the_same_text_passes_over_the_same(tmp_path: Path) -> None:
    job, corpora = _job(tmp_path, {"a": 0.5, "b": 0.5})
    first, again = TrainState(), TrainState()
    read = _attempt(job, corpora, tmp_path, first, steps=10)
    assert _attempt(job, corpora, tmp_path, again, steps=10) == read
    assert again == first
    job, corpora = _job(tmp_path, {"a": 0.7, "b": 0.3})  # from the start: nothing was saved
    assert _attempt(job, corpora, tmp_path, other := TrainState(), steps=10) != read
    assert other.skipped == []


def test_a_rewind_that_skips_more_is_booked_as_such(tmp_path: Path) -> None:
    job, corpora = _job(tmp_path, {"a": 0.5, "b": 0.5})
    place, phase = torch.device("cpu"), Plan.of(job).phases[0]
    feed = Feed(job, corpora, place=place, data_parallel_rank=0, data_parallel_size=1)
    for first, past in ((20, 24), (16, 28)):
        state = TrainState(skipped=[{"phase": 0, "first": first, "past": past}])
        booked = feed.phase(phase, state).ledger_at(40)
        assert sum(line["skipped_windows"] for line in booked.values()) == past - first

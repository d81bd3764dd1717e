"""What a run reads is what it counted, and only tokens that its model has."""

import numpy as np
import pytest
import torch

from megatron_ext.data.config import SourceConfig
from megatron_ext.data.indexed import IndexedCorpus
from megatron_ext.data.writer import CorpusWriter
from megatron_ext.train.config import PhaseConfig
from megatron_ext.train.feed import Feed, check_ids
from megatron_ext.train.phases import Plan
from megatron_ext.train.state import TrainState
from tests.train.test_phases import run


def _corpus(prefix, *, token=5):
    with CorpusWriter(prefix, dtype=np.uint16) as writer:
        for _ in range(50):
            writer.add_document(np.full(100, token))
    return IndexedCorpus(prefix)


def _feed(corpus):
    job = run(PhaseConfig(tokens=640))
    job.data.sources = {"web": SourceConfig(path=str(corpus.prefix))}
    place = torch.device("cpu")
    feed = Feed(job, {"web": corpus}, place=place, data_parallel_rank=0, data_parallel_size=1)
    return feed, Plan.of(job).phases[0]


def test_text_that_changed_since_a_checkpoint_is_refused_within_its_phase(tmp_path):
    feed, phase = _feed(_corpus(tmp_path / "web"))
    consumed = feed.phase(phase, TrainState()).ledger_at(8)
    assert consumed["web"]["tokens"]
    state = TrainState(step=2, phase_samples=8, consumed=consumed)
    _feed(_corpus(tmp_path / "web"))[0].phase(phase, state)
    changed, _ = _feed(_corpus(tmp_path / "web", token=6))
    with pytest.raises(ValueError, match=r"data\.sources\.web\.path=.* holds other text"):
        changed.phase(phase, state)


def test_a_token_that_the_model_has_no_row_for_is_named(tmp_path):
    feed, phase = _feed(_corpus(tmp_path / "web", token=100))
    with pytest.raises(ValueError, match="samples 0 to 1 hold token 100 outside the vocab"):
        next(feed.step(phase, TrainState(), global_batch_size=4)())
    fine = {"tokens": torch.tensor([[3, 99]]), "labels": torch.tensor([[99, 7]])}
    check_ids(fine, range(1), vocab_size=100)
    with pytest.raises(ValueError, match="token 100"):  # a label is never an input of its window
        check_ids({**fine, "labels": torch.tensor([[99, 100]])}, range(1), vocab_size=100)

"""tools.evaluate predicts each held-out token once, as transformers does in the same windows."""

import json

import numpy as np
import pytest
import torch

from megatron_ext.convert.to_megatron import to_megatron
from megatron_ext.data.writer import CorpusWriter
from megatron_ext.testing import run_on_ranks
from tests.convert.models import make
from tools import evaluate as tool

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, a corpus of 41 tokens (two windows and a half) and one of 30."""
    folder = tmp_path_factory.mktemp("evaluate")
    make("tied", folder / "hf", max_position_embeddings=LENGTH)
    to_megatron(folder / "hf", folder / "ours")
    random = np.random.default_rng(0)
    for name, lengths in (("zh", (20, 21)), ("en", (30,))):
        with CorpusWriter(folder / name, dtype=np.uint16) as writer:
            for length in lengths:
                writer.add_document(random.integers(0, 300, length))
    return folder


def _theirs(folder, name, tokens):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    ids = torch.from_numpy(np.fromfile(folder / f"{name}.bin", dtype=np.uint16).astype(np.int64))
    total = 0.0
    for begin in range(0, tokens, LENGTH):
        piece = ids[begin : min(begin + LENGTH, tokens) + 1]
        with torch.no_grad():
            logits = model(piece[None, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
    return total / tokens


def _evaluates(folder):
    words = [str(folder / "ours"), "--data", str(folder / "zh"), str(folder / "en")]
    for name, more in (("all", []), ("first", ["--tokens", "20"])):
        assert tool.main([*words, *more, "--out", str(folder / f"{name}.json")]) == 0


def test_loss_and_perplexity_are_those_of_transformers(folder, capfd):
    run_on_ranks(_evaluates, folder, world_size=1)
    for name, counts in (("all", {"zh": 40, "en": 29}), ("first", {"zh": 20, "en": 20})):
        report = json.loads((folder / f"{name}.json").read_text())
        assert report["length"] == LENGTH
        assert {n: d["tokens"] for n, d in report["domains"].items()} == counts
        for domain, found in report["domains"].items():
            want = _theirs(folder, domain, counts[domain])
            assert found["loss"] == pytest.approx(want, abs=2e-5)
            assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    assert "perplexity" in capfd.readouterr().out


def test_what_cannot_be_scored_is_one_sentence(folder, tmp_path):
    with CorpusWriter(tmp_path / "other", dtype=np.uint16) as writer:
        writer.add_document(np.array([1, 60000]))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    ours, zh = str(folder / "ours"), str(folder / "zh")
    for words, says in (
        ([ours, "--data", str(tmp_path / "other")], "holds token id 60000"),
        ([ours, "--data", zh, zh], "two domains have one name"),
        ([ours, "--data", zh, "--length", "0"], "--length=0 must be at least 1"),
        ([str(tmp_path / "run"), "--data", zh], "without a good checkpoint"),
    ):
        with pytest.raises(ValueError, match=says):
            tool.main(words)

"""Loss by position is transformers' own, under its own rope types; the tool writes what it says."""

import json

import numpy as np
import pytest
import torch

from megatron_ext.convert.described import model_of
from megatron_ext.convert.to_megatron import to_megatron
from megatron_ext.data.writer import CorpusWriter
from megatron_ext.evaluate import alone
from megatron_ext.evaluate import loss_by_position as by_position
from megatron_ext.evaluate.loss_by_position import Setting, score, windows
from megatron_ext.testing import run_on_ranks
from tests.convert.models import make
from tools import loss_by_position as tool

LENGTH, BINS = 64, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tied model declared for 16 tokens, and a corpus with documents of 200, 64 and 65."""
    folder = tmp_path_factory.mktemp("positions")
    make("tied", folder / "hf", max_position_embeddings=16)
    to_megatron(folder / "hf", folder / "ours")
    random = np.random.default_rng(0)
    with CorpusWriter(folder / "long", dtype=np.uint16) as writer:
        for length in (200, LENGTH, LENGTH + 1):
            writer.add_document(random.integers(0, 300, length))
    with CorpusWriter(folder / "short", dtype=np.uint16) as writer:
        writer.add_document(random.integers(0, 300, 20))
    return folder


def test_windows_lie_inside_documents_and_are_as_long_as_asked(folder):
    found = windows([str(folder / "long"), str(folder / "short")], LENGTH)
    assert list(found) == ["long"] and [len(piece) for piece in found["long"]] == [LENGTH + 1] * 4
    whole = np.fromfile(folder / "long.bin", dtype=np.uint16)
    starts = (0, LENGTH, 2 * LENGTH, 200 + LENGTH)
    for piece, start in zip(found["long"], starts, strict=True):
        assert np.array_equal(piece, whole[start : start + LENGTH + 1])
    with pytest.raises(ValueError, match="needs a document of 65 tokens, and the longest .* 20"):
        windows([str(folder / "short")], LENGTH)


def _theirs(folder, pieces, setting):
    """[K, B] by transformers; ``dynamic`` gets the prefix that ends with each bin."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder / "hf")
    kind = {"as_trained": "default"}.get(setting.method, setting.method)
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": setting.factor}
    width, rows = LENGTH // BINS, []
    for piece in pieces:
        ids, row = torch.from_numpy(piece.astype(np.int64)), []
        for end in range(width, LENGTH + 1, width):
            model = AutoModelForCausalLM.from_pretrained(folder / "hf", config=config).eval()
            seen = ids[: end if setting.method == "dynamic" else LENGTH]
            with torch.no_grad():
                logits = model(seen[None]).logits[0, end - width : end]
            row.append(torch.nn.functional.cross_entropy(logits, ids[end - width + 1 : end + 1]))
        rows.append(torch.stack(row))
    return torch.stack(rows).double().numpy()


def _scores_are_theirs(folder):
    by_position.ROWS = 10  # several pieces of the head, the last one short
    pieces = windows([str(folder / "long")], LENGTH)["long"][:2]
    at = {"base": 10000.0, "trained": 16, "bins": BINS}
    with alone.loaded(folder / "ours") as model:
        plain = score(model, pieces, Setting(), **at)
        for word in ("as_trained", "linear=4", "dynamic=1", "dynamic=4"):
            setting = Setting.read(word)
            ours = score(model, pieces, setting, **at)
            np.testing.assert_allclose(ours, _theirs(folder, pieces, setting), atol=2e-5)
            changed = ~np.isclose(ours, plain, atol=1e-6).all(0)
            first = {"as_trained": BINS, "linear=4": 0}.get(word, 2)  # dynamic: past 16 tokens
            assert changed[first:].all() and not changed[:first].any(), word
        assert model.post_process


def test_losses_are_those_of_transformers_with_the_same_rope_type(folder):
    run_on_ranks(_scores_are_theirs, folder, world_size=1)


def _run_tool(folder):
    words = [str(folder / "ours"), "--data", str(folder / "long"), "--length", "64"]
    words += ["--rope", "as_trained", "dynamic=4", "--beside", f"itself={folder / 'ours'}"]
    assert tool.main([*words, "--out", str(folder / "out")]) == 0


def test_the_tool_writes_curves_that_are_held_against_the_last(folder, capfd):
    run_on_ranks(_run_tool, folder, world_size=1)
    report = json.loads((folder / "out" / "loss_by_position.json").read_text())
    assert report["trained"] == 16 and report["windows"] == {"long": 4}
    plain, dynamic, itself = report["curves"]
    assert [c["name"] for c in report["curves"]] == ["as_trained", "dynamic=4", "itself"]
    assert plain["loss"] == itself["loss"] and itself["more"] == 0.0
    assert dynamic["more"] == pytest.approx(dynamic["beyond"] - plain["beyond"])
    assert dynamic["more"] and dynamic["standard_error"] > 0
    assert plain["beyond"] == pytest.approx(np.mean(plain["loss"][2:]))
    assert (folder / "out" / "loss_by_position.png").read_bytes()[1:4] == b"PNG"
    assert "56-63" in capfd.readouterr().out


def test_text_of_another_vocabulary_is_refused_before_the_model_is_built(folder):
    rows = model_of(folder / "ours")[0].vocab_size
    with CorpusWriter(folder / "other", dtype=np.uint16) as writer:
        writer.add_document(np.append(np.zeros(LENGTH), rows))
    words = [str(folder / "ours"), "--data", str(folder / "other"), "--length", str(LENGTH)]
    sentence = f"--data holds token id {rows}, and .*ours has ids 0 to {rows - 1} "
    with pytest.raises(ValueError, match=sentence):
        tool.main(words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rope", "ntk=8"], "--rope=ntk is not known: choose one of as_trained, dynamic, linear"),
        (["--rope", "linear=x"], "--rope linear=x: x is no number"),
        (["--rope", "linear=0.5"], "must be at least 1"),
        (["--rope", "as_trained=2"], "takes no factor"),
        (["--bins", "7"], "--length=64 is not a multiple of --bins=7"),
        (["--beside", "x"], "--beside x: write NAME=CKPT"),
        (["--trained", "64"], "--trained=64 must lie below --length=64"),
        (
            ["--length", "1024"],
            "needs a document of 1025 tokens, and the longest .* has 200",
        ),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(folder, words, sentence):
    given = [str(folder / "ours"), "--data", str(folder / "long"), "--length", "64", *words]
    with pytest.raises(ValueError, match=sentence):
        tool.main(given)

"""The reach rule gives the published figures and warns of a base that is too small."""

import json

import pytest

from launch import train
from launch.compose import compose
from launch.preflight import check_all, say
from megatron_ext.checkpoint.folder import seal
from megatron_ext.checkpoint.parent import trained_length
from megatron_ext.plan.rope_reach import reach, smallest_base, warnings

INDEX = {"rotary_dim": 128, "trained": 4096}


@pytest.mark.parametrize(
    ("base", "tokens"),
    [(1e4, 4712), (3.2e5, 56_886), (5e6, 410_265), (1e7, 675_196)],
)
def test_the_reach_of_a_base_is_the_published_one(base, tokens):
    assert reach(base, **INDEX) == pytest.approx(tokens, abs=1)


def test_the_smallest_base_for_32k_is_near_148_thousand():
    assert smallest_base(32768, **INDEX) == pytest.approx(148.5e3, rel=1e-3)
    assert reach(smallest_base(32768, **INDEX), **INDEX) == pytest.approx(32768)


def test_the_recipe_of_index_32k_is_within_reach_and_its_old_base_is_not():
    assert warnings(compose(["recipe=index_1p9b_32k/long_pt"]), trained=4096) == []
    (text,) = warnings(
        compose(["recipe=index_1p9b_32k/long_pt", "phases.0.rotary_base=10000"]), trained=4096
    )
    assert "phases.0.rotary_base=10000 reaches about 4,712 tokens" in text and "148," in text


def test_a_run_that_lengthens_its_own_sequences_is_measured_by_its_first_phase():
    two = "phases=[{tokens: 4096, seq_length: 512}, {tokens: 8192, seq_length: 4096}]"
    job = compose(["model=index_tiny", "name=x", two])
    assert len(warnings(job)) == 1
    job.phases[1].rotary_base = 1e7
    assert warnings(job) == []


def _parent(folder, **meta):
    """A checkpoint of Index-1.9B at 4K, as far as its description goes."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"model": {"max_position_embeddings": 4096}}))
    seal(folder, {"step": 1, **meta}, {})
    return f"checkpoint.load={folder}"


LONG = ["recipe=index_1p9b_32k/long_pt", "cluster=h100_64"]


def test_what_the_parent_was_trained_at_is_read_from_it(tmp_path):
    declared = _parent(tmp_path / "converted")
    said = _parent(tmp_path / "trained", seq_length=8192)
    assert trained_length(tmp_path / "converted") == 4096
    assert trained_length(tmp_path / "trained") == 8192
    assert warnings(compose([*LONG, declared])) == []
    (text,) = warnings(compose([*LONG, declared, "phases.0.rotary_base=20000"]))
    assert "training on 4,096, and its sequences have 32,768: use at least 148," in text
    (text,) = warnings(compose([*LONG, said, "phases.0.rotary_base=20000"]))
    assert "training on 8,192" in text
    assert warnings(compose([*LONG, "checkpoint.load=nowhere", "phases.0.rotary_base=20000"])) == []
    (tmp_path / "converted" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say model.max_position_embeddings"):
        trained_length(tmp_path / "converted")


def test_preflight_warns_of_a_base_that_does_not_reach_and_refuses_nothing(tmp_path, capsys):
    parent = _parent(tmp_path / "parent")
    for base, mark in (("320000", "ok"), ("20000", "warning")):
        job = compose([*LONG, parent, f"phases.0.rotary_base={base}"])
        found = {one.name: one for one in check_all(job, data=False, real=False)}
        assert say(found["positions"]) == 0
        assert capsys.readouterr().out.startswith(mark)
    assert "reaches about" in found["positions"].words


def test_a_run_says_so_before_its_first_step(tmp_path, capsys):
    phases = "phases=[{tokens: 512, seq_length: 128}, {tokens: 4096, seq_length: 4096}]"
    words = ["model=index_tiny", "name=x", "precision=fp32", "data.synthetic=true", phases]
    words += ["batch={global_batch_size: 1, micro_batch_size: 1}", f"run_dir={tmp_path / 'run'}"]
    job = compose(words)
    train.warn(job)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: phases.1.rotary_base=10000 reaches about")
    train.warn(compose([*words, "phases.1.rotary_base=1e8"]))
    assert capsys.readouterr().err == ""

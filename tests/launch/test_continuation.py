"""Preflight holds what a run goes on from to the run that is asked for."""

import hashlib
import json
from pathlib import Path

import pytest

from launch.compose import compose
from launch.continuation import check_checkpoint
from launch.preflight import check_parent
from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.resumable import as_plain
from megatron_ext.digest import sha256_of

WORDS = ["recipe=index_1p9b/pretrain", "cluster=h100_64"]


def stored(folder: Path, job, tokenizer: str | None = None) -> Path:
    """A sealed checkpoint of ``job`` at step 100, without its tensors."""
    aside = folders.unfinished_folder(folder, 100)
    aside.mkdir(parents=True)
    data = json.dumps(as_plain(job)).encode()
    (aside / "run.json").write_bytes(data)
    facts = {"step": 100, "phase": 0, "tokenizer_sha256": tokenizer}
    folders.seal(aside, facts, {"run.json": (len(data), hashlib.sha256(data).hexdigest())})
    folders.publish(aside, folders.step_folder(folder, 100))
    return folders.step_folder(folder, 100)


def job(tmp_path, *words: str):
    return compose([*WORDS, f"run_dir={tmp_path}/run", *words])


def test_a_run_that_can_resume_says_from_which_step(tmp_path):
    assert check_checkpoint(job(tmp_path)) == "starts from nothing"
    stored(tmp_path / "run/checkpoints", job(tmp_path))
    assert "goes on from step 100" in check_checkpoint(job(tmp_path, "optimizer.lr=1e-4"))


def test_a_resume_of_another_shape_or_order_of_data_is_refused(tmp_path):
    stored(tmp_path / "run/checkpoints", job(tmp_path))
    with pytest.raises(ValueError, match=r"model.num_layers=35 cannot resume .*num_layers=36"):
        check_checkpoint(job(tmp_path, "model.num_layers=35"))
    with pytest.raises(ValueError, match="seed=7 cannot resume"):
        check_checkpoint(job(tmp_path, "seed=7"))


def test_a_parent_of_another_shape_tokenizer_or_nowhere_is_refused(tmp_path):
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"one")
    path = stored(tmp_path / "parent", job(tmp_path), sha256_of(tokenizer))
    words = [f"checkpoint.load={path}", f"data.tokenizer.path={tokenizer}"]
    assert check_checkpoint(job(tmp_path, *words)) == f"starts from {path}"
    # One KV head a query head, said and left to the default, is one shape.
    assert check_checkpoint(job(tmp_path, *words, "model.num_query_groups=16"))
    with pytest.raises(ValueError, match=r"model.num_query_groups=4 is not .*groups=16"):
        check_checkpoint(job(tmp_path, *words, "model.num_query_groups=4"))
    tokenizer.write_bytes(b"two")
    with pytest.raises(ValueError, match=r"data.tokenizer.path=.* is not the tokenizer"):
        check_checkpoint(job(tmp_path, *words))
    with pytest.raises(ValueError, match=r"checkpoint.load=.*/none cannot be started from"):
        check_checkpoint(job(tmp_path, f"checkpoint.load={tmp_path}/none"))


def test_a_stage_that_continues_nothing_given_is_refused():
    with pytest.raises(ValueError, match="checkpoint.load is empty"):
        check_parent(compose(["recipe=skywork_13b/stage2"]))

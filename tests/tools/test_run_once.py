"""A finished run is not run again, and is not taken for one of other settings."""

import pytest

from launch.compose import compose, save
from megatron_ext.resilience.outcome import Outcome, write_outcome
from tools import run_once

WORDS = ["recipe=quickstart", "scale=tiny"]


def test_a_finished_run_of_other_settings_is_refused(tmp_path):
    save(compose([*WORDS, f"run_dir={tmp_path}"]), tmp_path / "config.yaml")
    write_outcome(tmp_path, Outcome(word="finished"))
    run_once.run_once(tmp_path, WORDS)
    with pytest.raises(ValueError, match=r"optimizer.weight_decay=.*, and 0.5 is asked for"):
        run_once.run_once(tmp_path, [*WORDS, "optimizer.weight_decay=0.5"])


def test_words_that_make_no_run_leave_no_folder(tmp_path):
    with pytest.raises(ValueError, match="nosuch"):
        run_once.run_once(
            tmp_path / "run", [*WORDS, "model.nosuch=3"], log=tmp_path / "run" / "log"
        )
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_says_where_to_look(tmp_path):
    log = tmp_path / "run" / "arm.log"
    words = [*WORDS, "batch.micro_batch_size=0"]
    with pytest.raises(ValueError, match=r"ended with 2: see .*arm.log"):
        run_once.run_once(tmp_path / "run", words, log=log)
    assert "batch.micro_batch_size=0" in log.read_text()

"""A configuration that a run folder cannot take is refused before anything is written."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.compose import compose
from megatron_ext.checkpoint.folder import seal, step_folder
from megatron_ext.checkpoint.resumable import RUN, as_plain, check_resumable

ROOT = Path(__file__).parents[2]
WORDS = ["model=index_tiny", "data.synthetic=true", "phases=[{tokens: 1024}]", "name=x"]


def _job(run_dir: Path, *overrides: str):
    return compose([*WORDS, f"run_dir={run_dir}", *overrides])


def _checkpoint(run_dir: Path, step: int) -> Path:
    path = step_folder(run_dir / "checkpoints", step)
    path.mkdir(parents=True)
    data = json.dumps(as_plain(_job(run_dir))).encode()
    (path / RUN).write_bytes(data)
    seal(path, {"step": step, "phase": 0}, {RUN: (len(data), hashlib.sha256(data).hexdigest())})
    return path


def test_what_a_resume_may_change_passes_and_another_model_does_not(tmp_path):
    check_resumable(_job(tmp_path))  # nothing there yet
    _checkpoint(tmp_path, 8)
    check_resumable(_job(tmp_path, "optimizer.lr=1e-5", "phases.0.tokens=4096"))
    with pytest.raises(ValueError, match="model.num_layers=3 cannot resume .*num_layers="):
        check_resumable(_job(tmp_path, "model.num_layers=3"))


def test_an_unfinished_newer_checkpoint_does_not_decide(tmp_path):
    _checkpoint(tmp_path, 8)
    newer = _checkpoint(tmp_path, 16)
    (newer / "COMPLETE").unlink()
    (newer / RUN).write_text("{}")
    check_resumable(_job(tmp_path))


def test_a_damaged_newer_checkpoint_does_not_decide(tmp_path):
    _checkpoint(tmp_path, 8)
    run = _checkpoint(tmp_path, 16) / RUN
    run.write_text(run.read_text().replace('"num_layers": 4', '"num_layers": 9', 1))
    check_resumable(_job(tmp_path))


def test_a_refused_start_leaves_the_run_as_it_was(tmp_path):
    _checkpoint(tmp_path, 8)
    (tmp_path / "config.yaml").write_text("as it was\n")
    (tmp_path / "outcome").write_text("as it was\n")
    words = [*WORDS, f"run_dir={tmp_path}", "model.num_layers=3"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "model.num_layers=3 cannot resume" in done.stderr
    assert "torch" not in done.stderr and "Traceback" not in done.stderr
    for name in ("config.yaml", "outcome"):
        assert (tmp_path / name).read_text() == "as it was\n"

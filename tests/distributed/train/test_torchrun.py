"""Ranks that torchrun starts make the run that ranks of our own make."""

import subprocess
import sys

from launch.train import main
from megatron_ext.resilience.outcome import read_outcome
from megatron_ext.train.read_metrics import read

OVERRIDES = [
    "recipe=index_1p9b/pretrain",
    "scale=tiny",
    "data.synthetic=true",
    "parallel.tensor_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "logging.tensorboard=false",
]


def _curve(run_dir):
    outcome = read_outcome(run_dir)
    assert outcome is not None and outcome.word == "finished", outcome
    records = [r for r in read(run_dir / "metrics.jsonl") if "loss" in r]
    return [(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in records]


def test_torchrun_trains_as_nproc_does(tmp_path):
    ours, theirs = tmp_path / "nproc", tmp_path / "torchrun"
    assert main([*OVERRIDES, f"run_dir={ours}", "launch.nproc=2"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "launch.train", *OVERRIDES, f"run_dir={theirs}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert _curve(theirs) == _curve(ours)
    assert (theirs / "logs" / "rank1.log").exists(), "two ranks, not one"

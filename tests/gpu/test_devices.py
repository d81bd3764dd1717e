"""The device layer on a real GPU: peaks, memory, the opening lines, and stopping."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import GPUS
from tests.gpu.runs import ROOT, TINY, corpus, overrides, script, train


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of all runs here."""
    return corpus(tmp_path_factory.mktemp("corpus"))


def _settings() -> dict[str, Any]:
    return {} if GPUS else TINY


def test_the_device_is_found_and_its_memory_counted(record: Any) -> None:
    import torch

    from megatron_ext.devices import device
    from megatron_ext.devices.memory import peak_memory_bytes

    here = device.current()
    assert (here.name, here.backend) == ("cuda", "nccl")
    before = peak_memory_bytes()
    block = torch.zeros(1 << 28, dtype=torch.uint8, device=here.torch_device(0))
    here.synchronize()
    assert peak_memory_bytes() >= before + block.numel()
    record("device", name=torch.cuda.get_device_name(), torch=torch.__version__)


def test_the_measured_matmul_rate_lies_below_the_published_peak(record: Any) -> None:
    import torch

    from megatron_ext.devices.cuda import _measured_flops, chip_of_name, dense_peak_flops

    square = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda")
    measured, published = _measured_flops(square), dense_peak_flops("bf16")
    record("device", measured_tflops=measured / 1e12, published_tflops=published / 1e12)
    if chip_of_name(torch.cuda.get_device_name()):
        assert 0.4 * published < measured < 1.05 * published
    assert dense_peak_flops("fp32") < published


def test_one_gpu_is_fit_and_a_rate_above_its_own_is_not(tmp_path: Path, record: Any) -> None:
    import torch
    import torch.distributed as dist

    from launch.cluster_config import ClusterConfig
    from launch.health_together import check_together
    from megatron_ext.devices import device

    place = device.current().torch_device(0)
    dist.init_process_group("nccl", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        assert check_together(ClusterConfig(min_device_tflops=1.0), place) == ({}, "")
        bad, _ = check_together(ClusterConfig(min_device_tflops=1e6), place)
    finally:
        dist.destroy_process_group()
    assert "below cluster.min_device_tflops=1e+06" in bad[0]
    record("device", health=bad[0], torch=torch.__version__)


@pytest.mark.rehearsed
def test_a_run_opens_with_the_paths_it_takes(record: Any) -> None:
    text = script("one_model", "open", "auto", "bf16")
    record("opening", lines=text)
    assert "layers:" in text and "attention:" in text
    assert ("NCCL" if GPUS else "gloo") in text


@pytest.mark.rehearsed
@pytest.mark.parametrize("impl", ["transformer_engine", "local"] if GPUS else ["local"])
def test_a_dry_run_counts_what_the_planner_does(impl: str) -> None:
    agreed = json.loads(script("one_model", "dry", impl))
    assert len(agreed) == 4 and all(agreed)


def test_forked_ranks_are_refused_on_gpus(prefix: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="torchrun"):
        train(tmp_path / "run", prefix, steps=2, settings={"launch.nproc": 2})


@pytest.mark.rehearsed
def test_a_stop_request_reaches_the_gpu_ranks(prefix: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle of a long run: state is saved and the word is left."""
    run_dir = tmp_path / "run"
    asked = overrides(run_dir, prefix, steps=4000, settings=_settings())
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.train", *asked], cwd=ROOT, env=environ
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    assert "stopped" in (run_dir / "outcome").read_text()
    assert list((run_dir / "checkpoints").glob("step_*"))

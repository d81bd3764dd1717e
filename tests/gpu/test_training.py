"""Real runs of a small Index shape: FP8 against bf16, exact resume, several GPUs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.devices.cuda import can_run
from tests.gpu.conftest import GPUS, MACHINE
from tests.gpu.runs import TINY, corpus, script, train

FP8 = ("fp8_delayed", "fp8_current", "fp8_block", "mxfp8")
STEPS = 120 if GPUS else 6
FP8_TOLERANCE = 0.02
"""Relative difference of the mean loss of the last 20 of 120 steps from bf16's."""

DETERMINISTIC = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
}
LAYOUTS = {
    "tp2_sp": {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True},
    "tp2_sp_overlap": {
        "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": True,
        "parallel.tp_comm_overlap": True,
    },
    "pp2": {"parallel.pipeline_model_parallel_size": 2},
    "dp2": {},
    "dp2_zero1": {
        "parallel.use_distributed_optimizer": True,
        "parallel.overlap_grad_reduce": True,
        "parallel.overlap_param_gather": True,
    },
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of all runs here."""
    return corpus(tmp_path_factory.mktemp("corpus"))


def _settings(**more: Any) -> dict[str, Any]:
    return {**({} if GPUS else TINY), **more}


def _tail(rows: list[dict[str, Any]], count: int = 20) -> float:
    losses = [row["loss"] for row in rows[-count:]]
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def bf16(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The run that FP8 is compared with."""
    folder = tmp_path_factory.mktemp("bf16")
    return train(folder / "run", prefix, steps=STEPS, settings=_settings(precision="bf16"))


@pytest.mark.rehearsed
def test_the_loss_of_real_text_falls(bf16: list[dict[str, Any]], record: Any) -> None:
    first, last = bf16[0]["loss"], bf16[-1]["loss"]
    record("training", precision="bf16", first_loss=first, last_loss=last, steps=len(bf16))
    assert len(bf16) == STEPS and last < first


@pytest.mark.parametrize("precision", FP8)
def test_fp8_reaches_the_loss_of_bf16(
    precision: str, prefix: Path, bf16: list[dict[str, Any]], tmp_path: Path, record: Any
) -> None:
    if not can_run(precision, MACHINE.capability):
        pytest.skip(f"{precision} does not run on compute capability {MACHINE.capability}")
    rows = train(tmp_path / "run", prefix, steps=STEPS, settings=_settings(precision=precision))
    apart = abs(_tail(rows) - _tail(bf16)) / _tail(bf16)
    record("fp8", precision=precision, loss=_tail(rows), bf16=_tail(bf16), apart=apart)
    assert apart < FP8_TOLERANCE


@pytest.mark.rehearsed
@pytest.mark.parametrize("precision", ["bf16", "fp8_delayed"] if GPUS else ["bf16"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    precision: str, prefix: Path, tmp_path: Path, record: Any
) -> None:
    if not can_run(precision, MACHINE.capability):
        pytest.skip(f"{precision} does not run here")
    settings = _settings(precision=precision) | {"checkpoint.interval_steps": 10}
    whole = train(tmp_path / "a", prefix, steps=20, settings=settings, environ=DETERMINISTIC)
    saved = next((tmp_path / "a" / "checkpoints").glob("step_*10"))
    shutil.copytree(saved, tmp_path / "b" / "checkpoints" / saved.name)
    resumed = train(tmp_path / "b", prefix, steps=20, settings=settings, environ=DETERMINISTIC)
    wanted = {row["step"]: row["loss"] for row in whole if row["step"] > 10}
    found = {row["step"]: row["loss"] for row in resumed}
    apart = max(abs(found[step] - loss) for step, loss in wanted.items())
    record("resume", precision=precision, steps=len(wanted), largest_difference=apart)
    assert found == wanted


@pytest.mark.rehearsed
def test_a_background_save_holds_training_up_for_less_than_a_blocking_one(
    tmp_path: Path, record: Any
) -> None:
    measured = json.loads(script("one_model", "stall", str(tmp_path), "200" if GPUS else "4"))
    blocking, background = (min(measured[kind]) for kind in ("blocking", "background"))
    record("checkpoint", bytes=measured["bytes"], blocking=blocking, background=background)
    assert background < blocking or not GPUS


@pytest.mark.gpus(2)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_two_gpus_give_the_losses_of_one(
    layout: str, prefix: Path, tmp_path: Path, record: Any
) -> None:
    settings = _settings(precision="bf16")
    one = train(tmp_path / "one", prefix, steps=10, settings=settings)
    two = train(tmp_path / "two", prefix, steps=10, ranks=2, settings=settings | LAYOUTS[layout])
    apart = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(one, two, strict=True))
    record("layouts", layout=layout, largest_relative_difference=apart)
    assert apart < 5e-3  # bf16, other orders of summation

"""Tokens/s, MFU and memory of Index-1.9B's block shapes, beside what the planner predicts."""

import statistics
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.devices.cuda import can_run, chip_of_name
from tests.gpu.conftest import GPUS, MACHINE
from tests.gpu.runs import corpus, train

ROOT = Path(__file__).parents[2]
LAYERS = 12
"""A third of the model: weights, masters and moments of all 36 need 39 GB before activations."""

SHAPE = {
    "model": "index_1p9b",
    "model.num_layers": LAYERS,
    "batch.seq_length": 4096,
    "batch.micro_batch_size": 1,
    "batch.global_batch_size": 8,
    "model.max_position_embeddings": 4096,
    "data.synthetic": True,
}
PUBLISHED = {"model.hidden_size": 2048, "model.ffn_hidden_size": 5888, "model.vocab_size": 65029}
REHEARSED = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 192,
    "model.num_attention_heads": 4,
    "model.vocab_size": 509,
    "batch.seq_length": 64,
    "batch.global_batch_size": 2,
}


def predicted(precision: str) -> float | None:
    """Seconds of a step by the planner, for this machine's GPU; None where it has no table."""
    if not GPUS:
        return None
    from launch.compose import compose
    from megatron_ext.plan.constants import CONSTANTS
    from megatron_ext.plan.hardware import hardware, network
    from megatron_ext.plan.layer_time import Machine
    from megatron_ext.plan.layout import Layout, Shape
    from megatron_ext.plan.step_time import step_time

    chip = chip_of_name(MACHINE.gpus[0].name)
    word = next((p.stem for p in (ROOT / "conf/hardware").glob(f"{chip}*.yaml") if chip), None)
    if word is None:
        return None
    asked = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in SHAPE.items()]
    run = compose([*asked, "name=speed", f"precision={precision}", "phases=[{tokens: 1}]"])
    machine = Machine(
        hardware=hardware(word),
        network=network("ib_ndr_8x400"),
        gpus_per_node=8,
        constants=CONSTANTS,
    )
    return step_time(machine, Shape.of(run.model, 1), Layout.of(run, 1)).total


@pytest.mark.rehearsed
@pytest.mark.parametrize("precision", ["bf16", "fp8_current", "fp8_delayed"] if GPUS else ["bf16"])
def test_index_blocks_train_at_a_measured_rate(precision: str, tmp_path: Path, record: Any) -> None:
    if not can_run(precision, MACHINE.capability):
        pytest.skip(f"{precision} does not run on compute capability {MACHINE.capability}")
    settings = {**SHAPE, **(PUBLISHED if GPUS else REHEARSED), "precision": precision}
    rows = train(tmp_path / "run", corpus(tmp_path), steps=20 if GPUS else 4, settings=settings)
    late = rows[len(rows) // 2 :]
    seconds = statistics.median(row["seconds"] for row in late)
    record(
        "speed",
        precision=precision,
        layers=settings["model.num_layers"],
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in late),
        mfu=statistics.median(row["mfu"] for row in late),
        memory_gib=max(row["memory_gib"] for row in rows),
        seconds=seconds,
        planned_seconds=predicted(precision),
    )
    assert seconds > 0

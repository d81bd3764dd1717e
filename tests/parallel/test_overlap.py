"""Overlap and memory settings are refused at compose time where Megatron would fail late."""

from dataclasses import fields, replace

import pytest

from megatron_ext.config import RunConfig
from megatron_ext.devices.config import KernelsConfig, PrecisionConfig
from megatron_ext.models.config import ModelConfig
from megatron_ext.parallel import overlap
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.train.config import PhaseConfig

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LOCAL = KernelsConfig(transformer_impl="local")
DELAYED = PrecisionConfig(fp8="hybrid", fp8_recipe="delayed")


def run(parallel: dict[str, object], **parts: object) -> RunConfig:
    shape = ModelConfig(
        num_layers=8,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=8,
        num_query_groups=4,
        vocab_size=100,
    )
    phases = [PhaseConfig(tokens=1)]
    base = RunConfig(name="x", model=shape, phases=phases, parallel=ParallelConfig(**parallel))  # type: ignore[arg-type]
    return replace(base, **parts)  # type: ignore[arg-type]


def test_the_defaults_are_legal() -> None:
    overlap.check(run({}))


def test_everything_on_at_once_is_legal_where_the_rules_are_met() -> None:
    everything = {
        **TP2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "context_parallel_size": 2,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "tp_comm_overlap": True,
        "use_sharp": True,
        "manual_gc_interval": 50,
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm", "mlp"],
    }
    overlap.check(run(everything))


@pytest.mark.parametrize(
    "parallel, parts, words",
    [
        ({"tp_comm_overlap": True}, {}, "tp_comm_overlap=true needs parallel.sequence_parallel"),
        ({**TP2, "tp_comm_overlap": True}, {"kernels": LOCAL}, "needs Transformer Engine"),
        (
            {**TP2, "tp_comm_overlap": True},
            {"phases": [PhaseConfig(tokens=1), PhaseConfig(tokens=1, seq_length=32768)]},
            "sequences of 4096, 32768 tokens",
        ),
        ({"overlap_param_gather": True}, {}, "use_distributed_optimizer=true"),
        (
            {"overlap_param_gather": True, "use_distributed_optimizer": True},
            {},
            "overlap_grad_reduce=true",
        ),
        (
            {"recompute_granularity": "full", "recompute_num_layers": 9},
            {},
            "between 1 and the 8 layers",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
            {},
            "core_attn, layernorm, mlp",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
            {"precision": DELAYED},
            "fp8_recipe=delayed",
        ),
        ({"context_parallel_size": 2, "cp_comm_type": "ring"}, {}, "p2p, all_gather, a2a"),
        ({"context_parallel_size": 2}, {"kernels": LOCAL}, "context_parallel_size=2 needs Trans"),
        (
            {"context_parallel_size": 2},
            {"kernels": KernelsConfig(attention_backend="unfused")},
            "attention_backend=unfused",
        ),
        (
            {**TP2, "context_parallel_size": 4, "cp_comm_type": "a2a"},
            {},
            "4 groups / TP 2 = 2 is not a multiple of 4",
        ),
        (
            {"context_parallel_size": 2},
            {"phases": [PhaseConfig(tokens=1, packing="document")]},
            r"phases\.0\.packing=document cannot be isolated",
        ),
        ({"order": "dp-tp"}, {}, "tp-cp-ep-dp-pp"),
    ],
)
def test_illegal_combinations_are_refused(
    parallel: dict[str, object], parts: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        overlap.check(run(parallel, **parts))


def test_every_choice_names_a_field_that_exists() -> None:
    for choice in overlap.CHOICES:
        choice.value(run({}))
        assert choice.gain and choice.cost
    named = {choice.key for choice in overlap.CHOICES}
    assert named >= {
        f"parallel.{f.name}" for f in fields(ParallelConfig) if f.name.startswith("overlap_p")
    } - {"parallel.overlap_p2p_comm"}


@pytest.mark.parametrize(
    "parallel, capability, expected",
    [
        (TP2, (9, 0), "1"),
        ({"context_parallel_size": 2}, (8, 0), "1"),
        ({}, (9, 0), None),
        (TP2, (10, 0), None),
        (TP2, None, None),
    ],
)
def test_one_hardware_queue_is_asked_for_where_overlap_counts_on_it(
    parallel: dict[str, object], capability: tuple[int, int] | None, expected: str | None
) -> None:
    variables = overlap.environment(run(parallel), capability=capability)
    assert variables.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected


def test_tensor_parallel_groups_that_cross_nodes_are_warned_about() -> None:
    assert overlap.topology_warnings(run(TP2), gpus_per_node=8) == []
    three = run({"tensor_model_parallel_size": 3})
    assert "cross nodes" in overlap.topology_warnings(three, gpus_per_node=8)[0]
    uneven = run({"tensor_model_parallel_size": 4, "context_parallel_size": 3})
    assert "straddle" in overlap.topology_warnings(uneven, gpus_per_node=8)[0]

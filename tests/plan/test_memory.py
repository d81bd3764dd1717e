"""Bytes by stage: identities of the optimizer, activations in flight, and measured peaks."""

from dataclasses import replace

import pytest

from megatron_ext.plan.layout import Layout, Shape
from megatron_ext.plan.memory import (
    GIB,
    kept_activations,
    layer_activations,
    stage_memory,
    state_bytes,
)
from megatron_ext.plan.schedule import held, operations

SKYWORK = Shape(layers=52, hidden=4608, ffn=12288, heads=36, groups=36, head_dim=128, vocab=65536)
LAYOUT = Layout(
    world_size=512,
    pp=2,
    global_batch=4096,
    seq_length=4096,
    distributed_optimizer=True,
    fused_kernels=False,
)


@pytest.mark.parametrize("d", [1, 2, 8, 256])
@pytest.mark.parametrize(
    ("dtype", "fp32_gradients", "held", "shared"),
    [("bf16", True, 6, 12), ("fp16", False, 4, 16), ("fp32", True, 8, 8)],
)
def test_bytes_of_a_parameter_are_those_of_megatrons_documentation(
    d, dtype, fp32_gradients, held, shared
):
    layout = replace(LAYOUT, world_size=2 * d, dtype=dtype, fp32_gradients=fp32_gradients)
    assert sum(state_bytes(layout)) == held + shared / d
    whole = replace(layout, distributed_optimizer=False)
    assert sum(state_bytes(whole)) == held + shared


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_gpt_layer_keeps_what_korthikanti_et_al_derive(tp, sequence_parallel):
    h, a, s, b = 1024, 16, 2048, 4
    gpt = Shape(
        layers=2, hidden=h, ffn=4 * h, heads=a, groups=a, head_dim=h // a, vocab=512, gated=False,
        norm_vectors=2, linear_bias=True, dropout=True, rotary=False,
    )  # fmt: skip
    layout = Layout(
        world_size=tp, tp=tp, micro_batch=b, global_batch=b, seq_length=s,
        sequence_parallel=sequence_parallel,
    )  # fmt: skip
    flash = s * b * h * (34 / tp if sequence_parallel else 10 + 24 / tp)
    assert layer_activations(gpt, layout) == flash
    unfused = replace(layout, flash_attention=False)
    assert layer_activations(gpt, unfused) == flash + s * b * h * 5 * a * s / (h * tp)
    assert layer_activations(gpt, replace(unfused, recompute="selective")) == flash
    full = kept_activations(gpt, replace(layout, recompute="full"))
    assert full == 2 * s * b * h / (tp if sequence_parallel else 1)


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (4, 1), (4, 13), (2, 13)])
def test_activations_of_a_stage_are_the_forwards_that_the_schedule_holds(pp, vpp):
    layout = replace(LAYOUT, pp=pp, vpp=vpp)
    for stage in stage_memory(SKYWORK, layout)[:-1]:
        listed = operations(stage.stage, pp, vpp, layout.micro_batches)
        layers = held(listed) * 52 / (pp * vpp)
        assert stage.activations == layers * layer_activations(SKYWORK, layout)


def test_skywork_13b_needs_a_pipeline_on_80_gib():
    fullest = max(stage.total for stage in stage_memory(SKYWORK, LAYOUT))
    assert 70 < fullest / GIB < 80
    alone = stage_memory(SKYWORK, replace(LAYOUT, pp=1))[0]
    assert alone.total / GIB > 80


def test_a_15b_model_of_megatrons_own_ci_is_met_within_2_percent():
    shape = Shape(
        layers=32, hidden=6144, ffn=24576, heads=48, groups=8, head_dim=128, vocab=256000,
        gated=False, norm_vectors=2,
    )  # fmt: skip
    layout = Layout(
        world_size=128, tp=8, micro_batch=4, global_batch=512, seq_length=4096,
        sequence_parallel=True, distributed_optimizer=True,
    )  # fmt: skip
    (stage,) = stage_memory(shape, layout)
    assert stage.static == pytest.approx(13269043200, rel=0.02)
    assert stage.peak == pytest.approx(28160194560, rel=0.02)

"""Seconds of a step: published rows, limits, and parts that add up."""

from dataclasses import replace

import pytest

from megatron_ext.plan.constants import FROZEN
from megatron_ext.plan.failures import best_interval, losses
from megatron_ext.plan.hardware import CONF, hardware, network
from megatron_ext.plan.layer_time import matmul
from megatron_ext.plan.layout import Layout, Shape
from megatron_ext.plan.machine import Machine
from megatron_ext.plan.step_time import stage_costs, step_time
from megatron_ext.plan.traffic import data_parallel, pipeline, tensor_parallel
from tests.plan.test_memory import LAYOUT, SKYWORK

A800 = Machine(
    hardware=hardware("a800"),
    network=network("roce_800"),
    gpus_per_node=8,
    constants=FROZEN,
)
H100 = replace(A800, hardware=hardware("h100"), network=network("ib_ndr_8x400"))
TOKENS_A_GPU = 4096 * 4096 / 512


@pytest.mark.parametrize(("tp", "pp", "rate"), [(1, 2, 1873), (2, 1, 1775), (2, 2, 1776)])
def test_the_skywork_report_is_met_within_4_percent(tp, pp, rate):
    layout = replace(LAYOUT, tp=tp, pp=pp, sequence_parallel=tp > 1)
    assert TOKENS_A_GPU / step_time(A800, SKYWORK, layout).total == pytest.approx(rate, rel=0.04)


def test_no_matmul_is_faster_than_the_peak_and_wide_ones_are_nearer_to_it():
    shares = [
        2 * n**3 / matmul(H100, n, n, n, format="bf16") / H100.hardware.peak["bf16"]
        for n in (512, 1024, 4096, 16384)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.4 and 0.6 < shares[-1] < 1


def test_fp8_speeds_up_block_linears_only():
    layout = replace(LAYOUT, fp8="delayed", fused_kernels=True)
    plain = step_time(H100, SKYWORK, replace(layout, fp8=None))
    fp8 = step_time(H100, SKYWORK, layout)
    assert 1.1 < plain.total / fp8.total < 2
    head = replace(SKYWORK, layers=2)
    gain = [stage_costs(H100, head, replace(layout, fp8=f))[-1].total for f in (None, "delayed")]
    assert gain[0] / gain[1] < plain.total / fp8.total


def test_the_bubble_is_that_of_equal_stages_divided_by_the_chunks():
    shape = replace(SKYWORK, vocab=128)
    for vpp in (1, 13):
        layout = replace(LAYOUT, pp=4, vpp=vpp)
        time = step_time(A800, shape, layout)
        work = (time.compute / (1 + FROZEN.jitter * 6)) / layout.micro_batches
        assert time.bubble == pytest.approx(3 * work / vpp, rel=0.02)


def test_volumes_are_those_of_the_formulas():
    layout = replace(LAYOUT, tp=4, pp=2, sequence_parallel=False)
    whole = 4096 * 4608 * 2
    assert tensor_parallel(SKYWORK, layout) == 8 * whole * 3 / 4
    full = replace(layout, recompute="full")
    assert tensor_parallel(SKYWORK, full) == 12 * whole * 3 / 4
    assert pipeline(SKYWORK, layout) == 2 * whole
    assert pipeline(SKYWORK, replace(layout, sequence_parallel=True)) == 2 * whole / 4
    assert data_parallel(layout, 1000) == 1000 * (4 + 2) * 63 / 64
    replicated = replace(layout, distributed_optimizer=False)
    assert data_parallel(replicated, 1000) == 2 * 1000 * 4 * 63 / 64


def test_the_best_interval_beats_its_neighbours_and_is_youngs_to_first_order():
    blocking, between = 3.0, 100_000.0
    best = best_interval(blocking, between)
    assert best == pytest.approx((2 * blocking * between) ** 0.5, rel=0.01)

    def lost(interval):
        return blocking / (interval + blocking) + interval / 2 / between

    assert lost(best) < min(lost(best * 1.3), lost(best / 1.3))
    assert losses(gpus=8, failures_per_gpu_hour=0, blocking=1, restart=1) is None


def test_every_figure_of_every_data_file_has_a_source():
    import yaml

    for file in [*(CONF / "hardware").glob("*.yaml"), *(CONF / "network").glob("*.yaml")]:
        for key, entry in yaml.safe_load(file.read_text()).items():
            if key not in ("generation", "fp8_recipes", "network"):
                assert entry["source"], (file.name, key)
        (hardware if file.parent.name == "hardware" else network)(file.stem)


def test_an_unknown_accelerator_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="a100, a100_40gb, a800, b200"):
        hardware("h900")


def test_ends_that_weigh_nothing_leave_equal_stages():
    shape = Shape(layers=6, hidden=256, ffn=512, heads=4, groups=4, head_dim=64, vocab=128)
    layout = Layout(world_size=8, pp=2, global_batch=64, seq_length=128, first_stage_layers=2)
    assert layout.chunk_layers(6) == [[2], [4]]
    first, last = stage_costs(A800, shape, layout)
    assert first.total < last.total

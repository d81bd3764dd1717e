"""A shrunk run keeps what makes its system: ratios, head, phases, ramps and batches."""

import copy
from functools import cache

import pytest

from launch import compose
from megatron_ext.optim.schedule import learning_rate
from megatron_ext.plan.parameters import count_parameters
from megatron_ext.plan.scale import shrink
from megatron_ext.train.phases import Plan

SYSTEMS = [
    "index_1p9b/pretrain",
    "stablelm2_1p6b/pretrain",
    "skywork_13b/stage1",
    "yi_6b/pretrain",
    "yi_34b/pretrain",
    "yi_9b/continued",
]


@cache
def composed(*overrides):
    return compose.compose(list(overrides))


def both(name, *overrides):
    full = composed(f"recipe={name}", *overrides)
    return full, shrink(full, composed("recipe=quickstart", "scale=proxy").scale)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_form_of_the_model_is_kept(name):
    full, small = (run.model for run in both(name))
    for key in ("family", "normalization", "rotary_percent", "add_qkv_bias", "norm_head",
                "untie_embeddings_and_output_weights", "rotary_base"):  # fmt: skip
        assert getattr(small, key) == getattr(full, key), key
    queries_per_group = full.num_attention_heads // full.query_groups()
    assert small.num_attention_heads == queries_per_group * small.query_groups()
    full_ffn = full.ffn_hidden_size / full.hidden_size
    assert small.ffn_hidden_size / small.hidden_size == pytest.approx(full_ffn, rel=0.05)
    assert small.hidden_size == small.head_dim() * small.num_attention_heads


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_model_is_near_the_wished_size_and_fits_two_ranks(name):
    small = both(name)[1].model
    assert 0.6e6 < count_parameters(small).non_embedding < 3.5e6
    assert small.num_layers % 2 == 0 and small.query_groups() % 2 == 0


def test_deeper_systems_stay_deeper_for_their_width():
    aspect = {}
    for name in ("index_1p9b/pretrain", "skywork_13b/stage1", "yi_9b/continued", "yi_6b/pretrain"):
        full, small = (run.model for run in both(name))
        wanted = full.num_layers / full.hidden_size
        aspect[wanted] = small.num_layers / small.hidden_size
        assert aspect[wanted] == pytest.approx(4 * wanted, rel=0.15)
    index, yi = max(aspect), min(aspect)
    assert aspect[index] == max(aspect.values()) and aspect[yi] == min(aspect.values())


@pytest.mark.parametrize("name", [n for n in SYSTEMS if n != "index_1p9b/pretrain"])
def test_the_relative_length_of_phases_is_kept(name):
    full, small = both(name)
    for a, b in zip(full.phases, small.phases):
        share = a.tokens / sum(p.tokens for p in full.phases)
        assert b.tokens / sum(p.tokens for p in small.phases) == pytest.approx(share, abs=0.02)


def test_every_phase_keeps_a_few_steps_however_short_it_is():
    small = both("index_1p9b/pretrain")[1]
    assert min(p.steps for p in Plan.of(small).phases) >= 16


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_curve_of_the_learning_rate_keeps_its_shape(name):
    full, small = both(name)
    factor = small.optimizer.lr / full.optimizer.lr
    assert factor == pytest.approx((full.model.hidden_size / small.model.hidden_size) ** 0.5)
    for i, (a, b) in enumerate(zip(full.phases, small.phases)):
        for share in (0.001, 0.1, 0.25, 0.5, 0.9, 1.0):
            rate = learning_rate(
                full.phases, full.optimizer, phase=i, phase_tokens=round(a.tokens * share)
            )
            shrunk = learning_rate(
                small.phases, small.optimizer, phase=i, phase_tokens=round(b.tokens * share)
            )
            assert shrunk == pytest.approx(rate * factor, rel=1e-2, abs=1e-6)


def test_ramps_steps_and_growth_of_the_batch_are_kept_in_proportion():
    full, small = both(
        "yi_6b/pretrain",
        "phases.0.batch_steps=[{after_tokens: 1000000000000, global_batch_size: 2048}, "
        "{after_tokens: 2000000000000, global_batch_size: 4096}]",
    )
    before, after = full.phases[0], small.phases[0]
    assert [s.global_batch_size for s in after.batch_steps] == [16, 32]
    assert after.global_batch_size is None and small.batch.global_batch_size == 8
    for a, b in zip(before.batch_steps, after.batch_steps):
        assert b.after_tokens / after.tokens == pytest.approx(
            a.after_tokens / before.tokens, rel=1e-6
        )
    grown = both("yi_9b/continued")[1]
    largest = grown.phases[0].batch_growth.max_global_batch_size
    assert largest == 4 * grown.batch.global_batch_size


def test_a_mixture_ramp_is_not_touched():
    full, small = both("skywork_13b/stage2")
    for key in ("mixture", "mixture_end", "ramp_power", "packing"):
        assert getattr(small.phases[0], key) == getattr(full.phases[0], key)


def test_long_context_keeps_its_ratio_to_the_short_one():
    short, long = both("index_1p9b/pretrain")[1], both("index_1p9b_32k/long_pt")[1]
    assert long.batch.seq_length == 8 * short.batch.seq_length
    assert long.phases[0].rotary_base == 320000.0


def test_the_layout_is_lowered_to_the_ranks_at_hand():
    full = compose.compose(["recipe=skywork_13b/stage1"])
    size = compose.compose(["recipe=skywork_13b/stage1", "scale=proxy", "scale.ranks=2"]).scale
    assert shrink(full, size).parallel.pipeline_model_parallel_size == 2
    size.ranks = 1
    assert shrink(full, size).parallel.pipeline_model_parallel_size == 1


def test_shrinking_changes_neither_argument():
    full = compose.compose(["recipe=yi_9b/continued"])
    size = compose.compose(["recipe=yi_9b/continued", "scale=tiny"]).scale
    before = copy.deepcopy((full, size))
    shrink(full, size)
    assert (full, size) == before

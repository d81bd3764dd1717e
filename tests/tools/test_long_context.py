"""The arms differ in length, base and packing only; lengths are the published ones over eight."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.compose import compose
from megatron_ext.check import check_run
from megatron_ext.plan import rope_reach
from tools import long_context


@pytest.fixture(scope="module")
def arms():
    parent = Path("parent")
    words = {
        "short": long_context.short(1_600_000),
        "long": long_context.further(600_000, parent, long=True),
        "control": long_context.further(600_000, parent, long=False),
    }
    found = {name: compose(said) for name, said in words.items()}
    for job in found.values():
        check_run(job, world_size=1)
    return found


def test_lengths_are_an_eighth_of_the_published_ones(arms):
    lengths = {name: job.batch.seq_length for name, job in arms.items()}
    assert lengths == {"short": 4096 // 8, "long": 32768 // 8, "control": 4096 // 8}


def test_all_arms_are_one_model_of_two_million_with_16_pairs(arms):
    shapes = [replace(job.model, max_position_embeddings=1) for job in arms.values()]
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0].head_dim() == 32 and shapes[0].norm_head


def test_control_and_long_read_the_same_text_in_equal_steps_at_equal_rates(arms):
    long, control = arms["long"], arms["control"]
    assert long.data == control.data and long.optimizer == control.optimizer
    assert long.seed == control.seed and long.checkpoint == control.checkpoint
    per_step = {job.batch.seq_length * job.batch.global_batch_size for job in (long, control)}
    assert per_step == {4096}
    assert replace(long.phases[0], rotary_base=None) == replace(control.phases[0], rotary_base=None)
    assert not long.checkpoint.load_optimizer  # as the recipe does


def test_the_base_carries_the_new_length_and_the_published_one_would_not(arms):
    assert rope_reach.warnings(arms["long"], trained=512) == []
    arms["long"].phases[0].rotary_base = 320000.0
    (text,) = rope_reach.warnings(arms["long"], trained=512)
    assert "reaches about 3,554" in text

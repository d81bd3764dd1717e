"""The ablations compare what they say, and a table reads their runs rightly."""

from pathlib import Path

import pytest

from launch.compose import compose
from megatron_ext.check import check_run
from megatron_ext.plan.parameters import count_parameters
from tools import ablation


def jobs(name):
    for arm in ablation.ABLATIONS[name].arms:
        job = compose(ablation.words_of(name, arm, tokens=300_000))
        check_run(job, world_size=1)
        yield arm, job


def differing(first, second):
    pairs = [
        (getattr(first, part), getattr(second, part)) for part in ("model", "optimizer", "batch")
    ]
    pairs += list(zip(first.phases, second.phases))
    return {key for a, b in pairs for key in vars(a) if vars(a)[key] != vars(b)[key]}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("norm_head", {"norm_head"}),
        ("lr", {"lr"}),
        ("schedule", {"schedule"}),
        ("schedule_data", {"schedule", "mixture"}),
        ("pure_boost", {"mixture"}),
        (
            "depth",
            {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"},
        ),
    ],
)
def test_arms_differ_only_in_what_is_studied(name, keys):
    (_, first), *others = jobs(name)
    assert set().union(*(differing(first, job) for _, job in others)) == keys


def test_the_deep_and_the_shallow_arm_have_equal_weights():
    sizes = [count_parameters(job.model).non_embedding_matmul for _, job in jobs("depth")]
    assert sizes == [331_776, 331_776]


def test_arms_of_the_rate_keep_their_published_ratio():
    small, large = (job.optimizer.lr for _, job in jobs("lr"))
    assert large / small == pytest.approx(2.5)


@pytest.mark.parametrize("name", ablation.ABLATIONS)
def test_every_arm_is_scored_on_the_text_it_reads_and_warms_up_for_whole_steps(name):
    for _, job in jobs(name):
        assert set(ablation.GENERAL) < set(job.data.validation)
        assert job.phases[0].schedule.warmup_tokens == 15_000
        read = {Path(job.data.sources[s].path).name for s in job.phases[0].mixture}
        assert read == set(ablation.GENERAL)


def record(step, loss, **more):
    return {"step": step, "tokens": step * 10, "loss": loss, "grad_norm": 1.0 + step, **more}


def scored(zh, other):
    return {"step": 19, "tokens": 190, "validation": {"zh-gov": zh, "zh-instruct": other}}


RUNS = {
    "a": [
        [record(i, 5 - i / 10, gradient_share={"head": 0.5}) for i in range(20)]
        + [scored(zh=3.0 + seed, other=7.0)]
        for seed in (0, 1)
    ]
}


def test_the_table_gives_means_over_seeds_their_range_and_the_gradient():
    row = ablation.table(RUNS).splitlines()[2]
    # The mean is over GENERAL, of which only zh-gov was scored: (3 + 4) / 2.
    assert row == "| a | 3.500 (range 1.000) | 3.500 | 7.000 | 3.150 | 3.50 to 19.50 | 50% |"

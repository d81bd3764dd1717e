"""The ablations compare what they say, and a table reads their runs rightly."""

import pytest

from launch.compose import compose
from megatron_ext.check import check_run
from megatron_ext.plan.parameters import count_parameters
from tools import ablation


def jobs(name):
    words = [f"recipe=ablation/{name}", "scale=proxy"]
    study = ablation.ABLATIONS[name]
    for arm, overrides in study.arms.items():
        own = ablation._scaled(words, overrides) if study.rates else overrides
        job = compose([*words, *own])
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
    assert sizes == [1_769_472, 1_769_472]


def test_arms_of_the_rate_keep_their_published_ratio():
    small, large = (job.optimizer.lr for _, job in jobs("lr"))
    assert large / small == pytest.approx(2.5)


def record(step, loss, **more):
    return {"step": step, "tokens": step * 10, "loss": loss, "grad_norm": 1.0, **more}


RUNS = {
    "a": [
        [record(i, 5 - i / 10) for i in range(20)]
        + [{"step": 19, "tokens": 190, "validation": {"zh": 3.0, "en": 4.0 + seed}}]
        for seed in (0, 1)
    ]
}


def test_the_table_gives_means_over_seeds_and_their_range():
    text = ablation.table(RUNS)
    assert "validation 3.7500 (range 0.5000)  train, last tenth 3.1500" in text
    assert "en 4.500  zh 3.000" in text


def test_the_picture_is_a_png(tmp_path):
    ablation.draw("norm_head", RUNS, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"

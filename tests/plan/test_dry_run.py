"""The real code at the real world size, held against the plan."""

from types import SimpleNamespace

import pytest

from launch.compose import choices, compose
from megatron_ext.plan.dry_run import built_parameters, distinct_stages, dry_run, rank_at
from megatron_ext.plan.layout import Layout, Shape
from megatron_ext.plan.parameters import count_parameters
from megatron_ext.plan.schedule import warm_up

CASES = [
    (512, ["recipe=skywork_13b/stage1"], [0, 256]),
    (512, ["recipe=skywork_13b/stage1", "parallel=skywork_dp128_tp2_pp2"], [0, 1, 256, 257]),
    (64, ["recipe=index_1p9b/pretrain", "precision=fp32"], [0]),
    (64, ["recipe=yi_34b/long_200k"], [0, 7]),
    (
        4096,
        [
            "recipe=index_1p9b/pretrain",
            "parallel.pipeline_model_parallel_size=4",
            "parallel.virtual_pipeline_model_parallel_size=3",
            "parallel.use_distributed_optimizer=false",
        ],
        [0, 1024, 3072],
    ),
]


RECIPES = [name for name in choices("recipe") if "/" in name]
GPUS = {"skywork_13b": 512, "stablelm2_1p6b": 512}
"""Published (SKR, SLM); the others' are not: 64, a few nodes of 8."""

PARAMETERS = {
    "index_1p9b": 2_172_819_456,
    "index_1p9b_32k": 2_172_819_456,
    "stablelm2_1p6b": 1_644_515_328,
    "skywork_13b": 13_854_113_280,
    "yi_6b": 6_061_035_520,
    "yi_9b": 8_829_407_232,
    "yi_34b": 34_388_917_248,
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_at_its_published_size_and_layout(name):
    system = name.split("/")[0]
    job, world = compose([f"recipe={name}"]), GPUS.get(system, 64)
    built = dry_run(job, world)
    for one in built:
        assert one.agrees, one
    ablation = count_parameters(job.model).total  # shapes of ours: not published
    assert built_parameters(job, world, built) == PARAMETERS.get(system, ablation)


@pytest.mark.parametrize(("world", "words", "ranks"), CASES)
def test_what_the_training_code_allocates_is_what_was_planned(world, words, ranks):
    built = dry_run(compose(words), world)
    assert [one.rank for one in built] == ranks
    for one in built:
        assert one.agrees and max(map(abs, one.off().values())) < 1e-3, one


def test_megatrons_own_refusal_is_passed_on():
    job = compose(["recipe=skywork_13b/stage1", "parallel.tensor_model_parallel_size=8"])
    with pytest.raises(ValueError, match="36"):
        dry_run(job, 512)


@pytest.mark.parametrize(
    ("stages", "chunks", "micro"), [(4, 1, 2), (4, 1, 16), (4, 3, 4), (8, 5, 64)]
)
def test_warm_ups_are_megatrons_own(stages, chunks, micro):
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    for stage in range(stages):
        group = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        here = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
        )
        ahead = get_pp_rank_microbatches(micro, chunks, stages, p2p_communicator=here)[2]
        assert warm_up(stage, stages, chunks, micro) == ahead


def test_ranks_follow_the_order_of_the_axes():
    layout = Layout(world_size=64, tp=2, pp=4, cp=2, global_batch=64, seq_length=128)
    assert rank_at(layout, "tp-cp-ep-dp-pp", tp_rank=1, stage=3) == 1 + 3 * 16
    assert rank_at(layout, "tp-cp-ep-pp-dp", tp_rank=1, stage=3) == 1 + 3 * 4


def test_equal_middle_stages_are_built_once():
    shape = Shape(layers=64, hidden=64, ffn=64, heads=2, groups=2, head_dim=32, vocab=128)
    layout = Layout(world_size=16, pp=16, global_batch=16, seq_length=128)
    assert distinct_stages(shape, layout) == [0, 1, 15]

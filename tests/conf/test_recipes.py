"""Every recipe composes at every scale, says where its numbers are from, and keeps the facts."""

import copy
import re
from functools import cache
from pathlib import Path

import pytest

from launch import compose
from megatron_ext.check import check_run
from megatron_ext.given import check_given
from megatron_ext.optim.schedule import check_schedules, learning_rate
from megatron_ext.plan.parameters import count_parameters
from megatron_ext.train.phases import Plan

CONF = Path(__file__).parents[2] / "conf"
RECIPES = compose.choices("recipe")
TAGS = r"\b(S[0-4]|CFG|SLM|SKR|YIR|CARD|R|D|UNKNOWN)\b"
SETTING = r"^\s*(tokens|batch|optimizer|schedule|mixture):.*\d"


@cache
def composed(*overrides):
    return compose.compose(list(overrides))


def recipe(name, *overrides):
    return copy.deepcopy(composed(f"recipe={name}", *overrides))


@pytest.mark.parametrize("scale", ["full", "proxy", "tiny"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_passes_the_checks_at_every_scale(name, scale):
    job = recipe(name, f"scale={scale}")
    check_schedules(job.phases, job.optimizer)
    plan = check_run(job, world_size=job.parallel.model_parallel_size())
    assert plan.steps >= 3 * len(plan.phases)
    if scale != "full":
        check_given(job)


@pytest.mark.parametrize(
    ("name", "world_size"),
    [("skywork_13b/stage1", 512), ("stablelm2_1p6b/pretrain", 512)],
)
def test_published_layouts_divide_their_batches(name, world_size):
    check_run(recipe(name), world_size=world_size)


@pytest.mark.parametrize("name", [r for r in RECIPES if "/" in r])
def test_a_recipe_is_short_and_tags_every_length_and_rate(name):
    lines = (CONF / "recipe" / f"{name}.yaml").read_text().splitlines()
    code = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    header = "\n".join(line for line in lines[1:4] if line.startswith("#"))
    assert re.search(TAGS, header), "the first lines say what is published, and where"
    assert 5 <= len(code) <= 25
    for line in code:
        if re.search(SETTING, line):
            assert re.search(TAGS, line.partition("#")[2]), line


@pytest.mark.parametrize("group", ["model", "optimizer", "parallel", "recipe"])
def test_a_default_of_ours_always_says_that_the_fact_is_unknown(group):
    for file in (CONF / group).rglob("*.yaml"):
        for line in file.read_text().splitlines():
            assert ("our default" in line) <= ("UNKNOWN" in line), f"{file.name}: {line}"


@pytest.mark.parametrize(
    ("model", "total"),
    [
        ("index_1p9b", 2_172_819_456),
        ("index_1p9b_32k", 2_172_819_456),
        ("stablelm2_1p6b", 1_644_515_328),
        ("skywork_13b", 13_854_113_280),
        ("yi_6b", 6_061_035_520),
        ("yi_6b_200k", 6_061_035_520),
        ("yi_vl_6b_text", 6_061_035_520),
        ("yi_9b", 8_829_407_232),
        ("yi_9b_200k", 8_829_407_232),
        ("yi_34b", 34_388_917_248),
        ("yi_34b_200k", 34_388_917_248),
        ("yi_vl_34b_text", 34_388_917_248),
        ("smollm2_135m", 134_515_008),
    ],
)
def test_a_model_file_has_the_published_number_of_parameters(model, total):
    job = compose.compose([f"model={model}", "name=count", "phases=[{tokens: 1}]"])
    assert count_parameters(job.model).total == total


def test_the_depth_study_compares_equal_parameters():
    deep, shallow = (
        count_parameters(recipe("ablation/depth", f"model={m}").model).non_embedding_matmul
        for m in ("index_1b_36l", "index_1b_9l")
    )
    assert deep == shallow == pytest.approx(1.01e9, rel=0.002)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("index_1p9b/pretrain", 2.8e12),
        ("index_1p9b/pretrain_pure", 2.8e12),
        ("index_1p9b_32k/long_pt", 10e9),
        ("stablelm2_1p6b/pretrain", 500_000 * 8_388_608),
        ("skywork_13b/stage1", 3.1e12),
        ("skywork_13b/stage2", 130e9),
        ("yi_6b/pretrain", 3.1e12),
        ("yi_34b/pretrain", 3.1e12),
        ("yi_9b/continued", 800e9),
        ("yi_6b/long_200k", 5e9),
    ],
)
def test_a_recipe_trains_the_published_number_of_tokens(name, tokens):
    assert sum(p.tokens for p in recipe(name).phases) == tokens


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("skywork_13b/stage1", [119_210, 65_566]),
        ("skywork_13b/stage2", [7_749]),
        ("stablelm2_1p6b/pretrain", [420_000, 80_000]),
        ("index_1p9b_32k/long_pt", [2_385]),
        ("yi_6b/long_200k", [1_250]),
    ],
)
def test_a_recipe_takes_the_published_number_of_steps(name, steps):
    assert [p.steps for p in Plan.of(recipe(name)).phases] == steps


@pytest.mark.parametrize("phase", [0, 1])
def test_index_keeps_chinese_to_english_at_four_to_five_and_code_at_six_percent(phase):
    for name in ("index_1p9b/pretrain", "index_1p9b/pretrain_pure"):
        mixture = recipe(name).phases[phase].mixture
        chinese = mixture["zh-web"] + mixture["zh-curated"]
        assert chinese / (mixture["en-web"] + mixture["en-curated"]) == pytest.approx(0.8, abs=1e-3)
        assert mixture["code"] == 0.06


def test_pure_and_boost_differ_by_seven_percent_instructions_in_the_decay_alone():
    pure = recipe("index_1p9b/pretrain_pure").phases
    boost = recipe("index_1p9b/pretrain").phases
    assert pure[0] == boost[0]
    assert boost[1].mixture.pop("instruct") == 0.07
    for source, share in boost[1].mixture.items():
        if source != "code":
            assert share == pytest.approx(pure[1].mixture[source] * 0.87 / 0.94, abs=2e-3)


def test_the_stem_share_of_skywork_averages_twenty_percent_of_the_tokens():
    phase = recipe("skywork_13b/stage2").phases[0]
    start, end = phase.mixture["stem"], phase.mixture_end["stem"]
    assert (start, end) == (0.1, 0.4)
    shares = [start + (end - start) * ((i + 0.5) / 7749) ** phase.ramp_power for i in range(7749)]
    assert sum(shares) / len(shares) == pytest.approx(0.2, abs=1e-6)


def test_stablelm2_reaches_its_cooldown_at_the_published_rate():
    job = recipe("stablelm2_1p6b/pretrain")
    last = job.phases[0].tokens
    before = learning_rate(job.phases, job.optimizer, phase=0, phase_tokens=last)
    after = learning_rate(job.phases, job.optimizer, phase=1, phase_tokens=0)
    assert after == 2.529e-4 and before == pytest.approx(after, rel=1e-4)


def test_text_that_was_not_given_is_refused_with_its_keys_and_a_way_out():
    with pytest.raises(ValueError, match=r"data.sources.zh-web.path.*are not given.*scale=proxy"):
        check_given(recipe("index_1p9b/pretrain"))


def test_a_later_stage_is_refused_without_its_parent():
    with pytest.raises(ValueError, match=r"checkpoint.load is empty.*Skywork-13B at 3.1T"):
        check_given(recipe("skywork_13b/stage2"))
    check_given(recipe("skywork_13b/stage2", "checkpoint.load=x", "data.synthetic=true"))

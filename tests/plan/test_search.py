"""Layout search and the two commands around it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.compose import compose
from launch.preflight import check_all, say
from launch.site import site
from megatron_ext.check import check_run
from megatron_ext.plan.report import plan_data, text
from megatron_ext.plan.search import overrides, search, why
from megatron_ext.plan.verdict import base_layout, judge_run, whole

SKYWORK = ["recipe=skywork_13b/stage1", "cluster=a800_512"]


@pytest.fixture(scope="module")
def found():
    job = compose(SKYWORK)
    where = site(job)
    return search(job.model, base_layout(job, where), where.machine())


def test_the_published_layout_comes_first_at_the_published_micro_batch(found):
    ones = [one for one in found.ranked if one.layout.micro_batch == 1]
    assert (ones[0].layout.tp, ones[0].layout.pp, ones[0].layout.dp) == (1, 2, 256)
    assert ones[0].tokens_per_second == pytest.approx(1873, rel=0.04)


def test_every_loser_says_why_and_what_does_not_fit_says_by_how_many_bytes(found):
    best = found.ranked[0]
    assert all("slower" in why(one, best) for one in found.ranked[1:])
    pure = [one for one in found.out_of_memory if one.layout.tp == one.layout.pp == 1]
    assert pure and all("over by" in why(one, best) and "bytes" in why(one, best) for one in pure)


def test_what_is_ranked_first_can_be_pasted_and_is_legal(found):
    job = compose([*SKYWORK, *overrides(found.ranked[0].layout)])
    check_run(job, world_size=512)
    planned = judge_run(job, site(job))
    assert planned.time.total == pytest.approx(found.ranked[0].time.total)


def test_all_layouts_of_a_search_pass_the_checks_of_a_run(found):
    for one in found.ranked[::120]:
        check_run(compose([*SKYWORK, *overrides(one.layout)]), world_size=512)


def test_a_plan_names_its_parts_and_is_plain_data():
    job = compose([*SKYWORK, "cluster.price_per_gpu_hour=2"])
    where = site(job)
    verdict = judge_run(job, where)
    run = whole(job, verdict, where)
    words = text(job, verdict, run, where)
    for part in ("13.854 B", "93.09 full, 87.20 causal", "interleaved x13", "cost", "Daly"):
        assert part in words
    data = json.loads(json.dumps(plan_data(job, verdict, run, where)))
    seconds = data["seconds"]
    assert sum(v for k, v in seconds.items() if k != "total") == pytest.approx(seconds["total"])


def test_planning_needs_no_torch_and_2_seconds_of_cpu():
    script = (
        "import sys, time; sys.argv = ['plan', *sys.argv[1:]]\n"
        "from tools.plan import main\nmain()\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "assert time.process_time() < 2, time.process_time()\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", script, *SKYWORK], check=True, cwd=root)


def test_fp8_on_hardware_without_it_is_refused_by_name():
    job = compose([*SKYWORK, "precision=fp8_delayed"])
    with pytest.raises(
        ValueError, match="fp8_recipe=delayed does not run on cluster.hardware=a800"
    ):
        judge_run(job, site(job))


def test_preflight_reports_every_refusal_and_goes_on():
    job = compose([*SKYWORK, "parallel.pipeline_model_parallel_size=1", "run_dir=nowhere/run"])
    found = {one.name: one for one in check_all(job, real=False)}
    assert not found["shapes"].refused
    assert "data.sources.en-web.path" in found["data"].words
    assert found["disk"].refused and "checkpoints of 194.0 GB" in found["disk"].words
    assert "out of memory" in found["memory and time"].words


def test_preflight_says_that_a_cluster_without_accelerators_is_not_planned():
    (found,) = [
        one
        for one in check_all(compose(["recipe=index_1p9b/pretrain"]), data=False, real=False)
        if one.name == "memory and time"
    ]
    assert not found.refused and "cluster.gpus_per_node=0" in found.words


@pytest.mark.parametrize("key", ["price_per_gpu_hour", "failures_per_gpu_hour", "nodes"])
def test_a_cluster_of_negative_figures_is_refused(key):
    job = compose([*SKYWORK, f"cluster.{key}=-1"])
    with pytest.raises(ValueError, match=f"cluster.{key}=-1.* must not be negative"):
        job.cluster.check()


def test_preflight_warns_of_groups_that_do_not_fill_nodes(capsys):
    job = compose([*SKYWORK, "parallel.tensor_model_parallel_size=3"])
    (found,) = [one for one in check_all(job, data=False, real=False) if one.name == "placement"]
    assert say(found) == 0
    assert capsys.readouterr().out.startswith(
        "warning  placement        parallel.tensor_model_parallel_size=3 does not divide the 8 GPUs"
    )


def test_preflight_plans_nothing_that_has_no_shape():
    job = compose([*SKYWORK, "parallel.tensor_model_parallel_size=8"])
    found = {one.name: one for one in check_all(job, data=False)}
    assert "4, 6 or 9" in found["shapes"].words
    assert "dry run" not in found and "memory and time" not in found


def test_a_search_can_be_held_to_one_micro_batch():
    job = compose(["recipe=index_1p9b/pretrain", "cluster=h100_64"])
    where = site(job)
    one = search(job.model, base_layout(job, where), where.machine(), only_micro_batch=2)
    assert one.considered and {v.layout.micro_batch for v in one.ranked} == {2}
    assert replace(one.ranked[0].layout, tp=1).world_size == 64

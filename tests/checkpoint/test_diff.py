"""Stored and asked configuration, field by field: harmless, effective now, or refused."""

from copy import deepcopy

import pytest

from megatron_ext.checkpoint.diff import RULES, refuse, resume_diff

RUN = {
    "name": "a",
    "seed": 1,
    "model": {"hidden_size": 32, "norm_head": True, "init_method_std": 0.02},
    "parallel": {"tensor_model_parallel_size": 1},
    "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
    "data": {"sources": {"web": {"path": "web"}}},
    "phases": [{"tokens": 100, "mixture": {}}, {"tokens": 50, "mixture": {"web": 1.0}}],
    "checkpoint": {"keep": 2},
}


def _diff(phase=0, **changes):
    asked = deepcopy(RUN)
    for key, value in changes.items():
        *path, last = key.split("__")
        place = asked
        for part in path:
            place = place[int(part)] if part.isdigit() else place[part]
        place[last] = value
    return {one.key: one for one in resume_diff(RUN, asked, phase=phase)}


def test_the_same_run_has_no_differences():
    assert _diff() == {}


@pytest.mark.parametrize(
    ("change", "value", "key", "verdict"),
    [
        ("optimizer__lr", 5e-4, "optimizer.lr", "now"),
        ("optimizer__weight_decay", 0.0, "optimizer.weight_decay", "now"),
        ("parallel__tensor_model_parallel_size", 2, None, "harmless"),
        ("checkpoint__keep", 5, "checkpoint.keep", "harmless"),
        ("name", "b", "name", "harmless"),
        ("seed", 2, "seed", "refused"),
        ("model__hidden_size", 64, "model.hidden_size", "refused"),
        ("model__norm_head", False, "model.norm_head", "refused"),
        ("model__init_method_std", 0.1, "model.init_method_std", "harmless"),
        ("phases__1__tokens", 80, "phases.1.tokens", "now"),
    ],
)
def test_one_difference_has_one_verdict(change, value, key, verdict):
    (one,) = _diff(**{change: value}).values()
    assert one.key == (key or change.replace("__", "."))
    assert one.verdict == verdict
    assert one.reason
    assert str(value) in str(one)


def test_a_phase_that_is_over_cannot_change():
    assert _diff(phase=1, phases__0__tokens=90)["phases.0.tokens"].verdict == "refused"
    assert _diff(phase=1, phases__1__tokens=90)["phases.1.tokens"].verdict == "now"


def test_a_source_can_be_added_but_not_exchanged():
    added = _diff(data__sources__code={"path": "code"})
    assert [one.verdict for one in added.values()] == ["now"]
    assert _diff(data__sources__web__path="other")["data.sources.web.path"].verdict == "refused"


def test_whole_numbers_and_their_floats_are_the_same():
    assert _diff(optimizer__weight_decay=0.1, phases__0__tokens=100.0) == {}


def test_refusal_names_the_first_difference_and_counts_the_rest():
    differences = list(_diff(seed=2, model__hidden_size=64, optimizer__lr=1.0).values())
    with pytest.raises(ValueError, match=r"seed=2 cannot resume .* seed=1.*1 more"):
        refuse(differences)
    refuse([one for one in differences if one.verdict != "refused"])


def test_every_part_of_a_run_has_a_rule():
    from dataclasses import fields

    from megatron_ext.config import RunConfig

    ruled = {pattern.split(".")[0] for pattern, _, _ in RULES}
    assert {field.name for field in fields(RunConfig)} <= ruled

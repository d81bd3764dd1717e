"""The reach rule gives the published figures and warns of a base that is too small."""

import pytest

from launch.compose import compose
from megatron_ext.plan.rope_reach import reach, smallest_base, warnings

INDEX = {"rotary_dim": 128, "trained": 4096}


@pytest.mark.parametrize(
    ("base", "tokens"),
    [(1e4, 4712), (3.2e5, 56_886), (5e6, 410_265), (1e7, 675_196)],
)
def test_the_reach_of_a_base_is_the_published_one(base, tokens):
    assert reach(base, **INDEX) == pytest.approx(tokens, abs=1)


def test_the_smallest_base_for_32k_is_near_148_thousand():
    assert smallest_base(32768, **INDEX) == pytest.approx(148.5e3, rel=1e-3)
    assert reach(smallest_base(32768, **INDEX), **INDEX) == pytest.approx(32768)


def test_the_recipe_of_index_32k_is_within_reach_and_its_old_base_is_not():
    assert warnings(compose(["recipe=index_1p9b_32k/long_pt"]), trained=4096) == []
    (text,) = warnings(
        compose(["recipe=index_1p9b_32k/long_pt", "phases.0.rotary_base=10000"]), trained=4096
    )
    assert "phases.0.rotary_base=10000 reaches about 4,712 tokens" in text and "148," in text


def test_a_run_that_lengthens_its_own_sequences_is_measured_by_its_first_phase():
    two = "phases=[{tokens: 4096, seq_length: 512}, {tokens: 8192, seq_length: 4096}]"
    job = compose(["model=index_tiny", "name=x", two])
    assert len(warnings(job)) == 1
    job.phases[1].rotary_base = 1e7
    assert warnings(job) == []

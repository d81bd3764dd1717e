"""The batch grows when the loss stops falling, and a resumed run decides the same."""

import json
import random

import pytest

from megatron_ext.optim.growth import PlateauState
from megatron_ext.train.config import PlateauGrowth


def settings(**changes):
    defaults = {"max_global_batch_size": 64, "patience_steps": 10, "smoothing_steps": 1}
    return PlateauGrowth(**{**defaults, **changes})


def run(losses, growth, state=None, first=0):
    state = state or PlateauState.start(8)
    for step, loss in enumerate(losses, start=first + 1):
        state.observe(loss, growth, step=step)
    return state


@pytest.mark.parametrize("test", ["best", "slope"])
def test_a_falling_loss_never_grows_the_batch(test):
    state = run([5.0 * 0.99**i for i in range(200)], settings(test=test))
    assert state.global_batch_size == 8 and state.decisions == []


@pytest.mark.parametrize("test", ["best", "slope"])
def test_a_flat_loss_grows_it_once_every_patience_until_the_largest(test):
    state = run([3.0] * 100, settings(test=test))
    assert [(d["step"], d["before"], d["after"]) for d in state.decisions] == [
        (11, 8, 16),
        (22, 16, 32),
        (33, 32, 64),
    ]
    assert state.global_batch_size == 64


def test_a_rising_loss_is_a_plateau_too():
    assert run([3.0 + i / 10 for i in range(12)], settings()).global_batch_size == 16


def test_a_fall_below_the_threshold_does_not_count_as_improvement():
    creeping = [3.0 * (1 - 1e-5) ** i for i in range(12)]
    assert run(creeping, settings(threshold=1e-3)).global_batch_size == 16
    assert run(creeping, settings(threshold=1e-6)).global_batch_size == 8


def test_the_mean_is_the_exponential_one_of_the_span():
    losses, growth = [4.0, 3.0, 5.0, 2.0], settings(smoothing_steps=3)
    mean = losses[0]
    for loss in losses[1:]:
        mean = 0.5 * loss + 0.5 * mean
    assert run(losses, growth).smoothed == pytest.approx(mean, rel=1e-15)


def test_a_step_without_a_finite_loss_changes_nothing():
    before = run([3.0] * 5, settings()).as_dict()
    after = run([float("nan"), float("inf")], settings(), PlateauState.from_dict(before))
    assert after.as_dict() == before


def test_grown_batches_are_multiples_of_the_first_so_that_they_divide_as_it_does():
    state = run([3.0] * 60, settings(factor=1.3, max_global_batch_size=40))
    assert [d["after"] for d in state.decisions] == [16, 24, 32, 40]


@pytest.mark.parametrize("test", ["best", "slope"])
def test_a_run_resumed_from_json_at_any_step_decides_as_the_whole_one(test):
    draw, growth = (
        random.Random(0),
        settings(test=test, smoothing_steps=7, max_global_batch_size=32),
    )
    losses = [3 + 2 * 0.97**i + draw.gauss(0, 0.05) for i in range(200)]
    whole = run(losses, growth)
    assert len(whole.decisions) == 2
    for cut in range(0, 200, 7):
        stored = json.loads(json.dumps(run(losses[:cut], growth).as_dict()))
        resumed = run(losses[cut:], growth, PlateauState.from_dict(stored), first=cut)
        assert resumed.as_dict() == whole.as_dict()


def test_a_next_phase_goes_on_with_the_batch_that_was_grown():
    grown = run([3.0] * 12, settings()).as_dict()
    assert PlateauState.start(8, before=grown) == PlateauState(global_batch_size=16, unit=8)
    assert PlateauState.start(8, before={}) == PlateauState.start(8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"factor": 1.0}, "factor=1.0 must be above 1"),
        ({"test": "worst"}, "best, slope"),
        ({"patience_steps": 0}, "patience_steps=0 must be at least 1"),
        ({"threshold": 1.0}, "threshold=1.0 must lie in"),
    ],
)
def test_settings_that_could_not_work_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        settings(**changes).check("phases.0.batch_growth")

"""Schedules agree with Megatron's, transformers' and hand-written ones at every step."""

import math
import warnings

import pytest

from megatron_ext.optim.config import OptimizerConfig, ScheduleConfig
from megatron_ext.optim.schedule import check_schedules, learning_rate
from megatron_ext.train.config import PhaseConfig

STEP = 4096 * 1024
STEPS, WARMUP, DECAY = 200, 20, 60
PEAK, FLOOR = 3e-4, 3e-5
OPTIMIZER = OptimizerConfig(lr=PEAK, min_lr=FLOOR)


def phase(steps=STEPS, **schedule):
    schedule = {"warmup_tokens": WARMUP * STEP, **schedule}
    return PhaseConfig(tokens=steps * STEP, schedule=ScheduleConfig(**schedule))


def curve(phases, number=0, steps=STEPS):
    return [
        learning_rate(phases, OPTIMIZER, phase=number, phase_tokens=step * STEP)
        for step in range(steps + 1)
    ]


def transformers_curve(name, **settings):
    import torch
    from transformers import optimization

    weight = torch.nn.Parameter(torch.zeros(1))
    make = getattr(optimization, f"get_{name}")
    scheduler = make(torch.optim.SGD([weight], lr=PEAK), num_warmup_steps=WARMUP, **settings)
    return [PEAK * scheduler.lr_lambdas[0](step) for step in range(STEPS + 1)]


def megatron_curve(style, decay=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, at import
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    class Groups:
        param_groups = ()

    scheduler = OptimizerParamScheduler(
        Groups(),
        init_lr=0.0,
        max_lr=PEAK,
        min_lr=FLOOR,
        lr_warmup_steps=WARMUP * STEP,
        lr_decay_steps=STEPS * STEP,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
        wsd_decay_steps=DECAY * STEP,
        lr_wsd_decay_style=decay,
    )
    rates = []
    for _ in range(STEPS + 1):
        rates.append(scheduler.get_lr({}))
        scheduler.step(STEP)
    return rates


@pytest.mark.parametrize(
    ("schedule", "style", "decay"),
    [
        ({"name": "constant"}, "constant", None),
        ({"name": "linear"}, "linear", None),
        ({"name": "cosine"}, "cosine", None),
        ({"name": "inverse_sqrt"}, "inverse-square-root", None),
        ({"name": "wsd", "decay": "linear"}, "WSD", "linear"),
        ({"name": "wsd", "decay": "cosine"}, "WSD", "cosine"),
        ({"name": "wsd", "decay": "exponential"}, "WSD", "exponential"),
        ({"name": "wsd", "decay": "1-sqrt"}, "WSD", "minus_sqrt"),
    ],
)
def test_every_step_is_that_of_megatron(schedule, style, decay):
    ours = curve([phase(decay_tokens=DECAY * STEP, **schedule)])
    assert ours == pytest.approx(megatron_curve(style, decay), rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "name", "settings"),
    [
        ({"name": "linear"}, "linear_schedule_with_warmup", {"num_training_steps": STEPS}),
        ({"name": "cosine"}, "cosine_schedule_with_warmup", {"num_training_steps": STEPS}),
        ({"name": "inverse_sqrt"}, "inverse_sqrt_schedule", {}),
        *(
            (
                {"name": "wsd", "decay": decay, "min_lr": FLOOR},
                "wsd_schedule",
                {
                    "num_decay_steps": DECAY,
                    "num_training_steps": STEPS,
                    "min_lr_ratio": FLOOR / PEAK,
                    "decay_type": decay,
                },
            )
            for decay in ("linear", "cosine", "1-sqrt")
        ),
    ],
)
def test_every_step_is_that_of_transformers(schedule, name, settings):
    schedule = {"min_lr": 0.0, "decay_tokens": DECAY * STEP, **schedule}
    theirs = transformers_curve(name, **settings)
    if name == "wsd_schedule":  # theirs warms up from its floor, ours and Megatron's from 0
        ours = curve([phase(**schedule)])
        assert ours[WARMUP:] == pytest.approx(theirs[WARMUP:], rel=1e-12)
    else:
        assert curve([phase(**schedule)]) == pytest.approx(theirs, rel=1e-12, abs=1e-18)


BATCH = 2 * 2 * 512 * 4096


def stablelm2(**changes):
    settings = {
        "name": "stablelm2",
        "lr": 1e-3,
        "min_lr": 1e-4,
        "warmup_tokens": 9720 * BATCH,
        "horizon_tokens": 540_000 * BATCH,
        **changes,
    }
    return [PhaseConfig(tokens=420_000 * BATCH, schedule=ScheduleConfig(**settings))]


def rate(phases, step, number=0):
    return learning_rate(phases, OPTIMIZER, phase=number, phase_tokens=step * BATCH)


def test_stablelm2_is_the_recalled_formula_with_the_published_constants():
    phases = stablelm2()
    for step in range(9720, 135_001, 613):
        closed = 1e-4 + 9e-4 / 2 * (math.cos(2 * math.pi * step / 540_000) + 1)
        assert rate(phases, step) == pytest.approx(closed, rel=1e-12)
    beta = 5.5e-4 * 540_000 / (2 * math.pi * 9e-4) - 135_000
    alpha = 5.5e-4 * math.sqrt(135_000 + beta)
    assert round(beta) == -82_479 and alpha == pytest.approx(0.126046, rel=1e-5)
    for step in range(135_001, 420_001, 997):
        assert rate(phases, step) == pytest.approx(alpha / math.sqrt(step + beta), rel=1e-12)
    assert rate(phases, 420_000) == pytest.approx(2.170e-4, rel=1e-3)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.4])
def test_stablelm2_joins_its_branches_with_one_value_and_one_slope(fraction):
    phases, join = stablelm2(cosine_fraction=fraction), int(fraction * 540_000)
    before, at, after = (rate(phases, join + d) for d in (-1, 0, 1))
    assert before - at == pytest.approx(at - after, rel=1e-3)


def test_stablelm2_reaches_the_published_anchor_with_a_horizon_of_685440_steps():
    phases = stablelm2(horizon_tokens=685_440 * BATCH)
    assert rate(phases, 420_000) == pytest.approx(2.529e-4, rel=1e-5)


def test_the_published_cooldown_is_a_linear_phase_from_the_anchor():
    cooldown = PhaseConfig(
        tokens=80_000 * BATCH, schedule=ScheduleConfig(name="linear", lr=2.529e-4, min_lr=0.0)
    )
    phases = [*stablelm2(), cooldown]
    for step in range(0, 80_001, 1000):
        assert rate(phases, step, number=1) == pytest.approx(
            2.529e-4 * (1 - step / 80_000), rel=1e-12, abs=1e-18
        )


def test_stablelm2_cools_down_inside_one_phase_from_wherever_the_root_stands():
    phases = stablelm2(decay_start_tokens=420_000 * BATCH, decay_tokens=80_000 * BATCH)
    phases[0].tokens = 500_000 * BATCH
    start = rate(stablelm2(), 420_000)
    for step in range(420_000, 500_001, 5000):
        share = (step - 420_000) / 80_000
        assert rate(phases, step) == pytest.approx(start * (1 - share), rel=1e-12, abs=1e-18)


def test_wsd_can_decay_from_a_set_token_and_stays_at_its_floor():
    phases = [phase(name="wsd", decay_start_tokens=100 * STEP, decay_tokens=50 * STEP)]
    rates = curve(phases)
    assert rates[100] == PEAK and rates[125] == pytest.approx((PEAK + FLOOR) / 2)
    assert set(rates[150:]) == {FLOOR}


def test_continue_is_the_same_curve_as_one_long_phase():
    whole = curve([phase(name="cosine")])
    split = [
        phase(steps=120, name="cosine"),
        phase(steps=50, name="continue", warmup_tokens=0),
        phase(steps=30, name="continue", warmup_tokens=0),
    ]
    check_schedules(split, OPTIMIZER)
    assert curve(split, number=0, steps=119) == whole[:120]
    assert curve(split, number=1, steps=49) == whole[120:170]
    assert curve(split, number=2, steps=30) == whole[170:]


def test_rates_of_the_optimizer_fill_in_for_a_phase_that_states_none():
    assert curve([phase(name="linear")])[-1] == FLOOR
    assert curve([phase(name="linear", lr=1e-5)])[-1] == 1e-5  # a floor never lifts the peak
    assert curve([phase(name="linear", min_lr=0.0)])[-1] == 0.0


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ({"warmup_tokens": 999 * STEP}, "warmup_tokens"),
        ({"name": "linear", "horizon_tokens": STEP}, "horizon"),
        ({"name": "inverse_sqrt", "warmup_tokens": 0}, "inverse_sqrt scales by it"),
        ({"name": "wsd", "decay_tokens": 190 * STEP}, "before the warmup ends"),
        ({"name": "wsd"}, "wsd needs phases.0.schedule.decay_tokens above 0"),
        ({"name": "stablelm2", "cosine_fraction": 0.5}, "cosine_fraction"),
        ({"name": "stablelm2", "min_lr": PEAK}, "must be below"),
        ({"name": "linear", "min_lr": 1.0}, "must lie between 0"),
        ({"name": "continue"}, "no phase before it"),
        ({"name": "cosign"}, "choose one of"),
        ({"decay": "quadratic"}, "choose one of"),
        ({"decay_tokens": -1}, "must not be negative"),
    ],
)
def test_an_impossible_schedule_is_refused_with_its_key(schedule, says):
    with pytest.raises(ValueError, match=says) as refusal:
        check_schedules([phase(**schedule)], OPTIMIZER)
    assert "phases.0.schedule" in str(refusal.value)


def test_a_setting_that_continue_would_ignore_is_refused():
    phases = [phase(), phase(name="continue", lr=1e-5)]
    with pytest.raises(ValueError, match=r"phases.1.schedule.lr=1e-05 would have no effect"):
        check_schedules(phases, OPTIMIZER)

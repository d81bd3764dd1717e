"""Restarts are decided by class, root and progress; nodes are set aside by strikes."""

import math
import random
import time

import pytest

from megatron_ext.check import check_run
from megatron_ext.resilience.attempts import Attempt
from megatron_ext.resilience.classify import CLASSES, INFRASTRUCTURE, Failure
from megatron_ext.resilience.config import RestartConfig, WatchConfig
from megatron_ext.resilience.drill import DrillConfig
from megatron_ext.resilience.policy import ACTIONS, Decision, decide, room, set_aside
from tests.train.test_phases import run

RESTART = RestartConfig()
NOW = time.time()


def _after(history: list[Attempt], failure: Failure, *, progressed: bool = False) -> Decision:
    """Decide on ``failure`` and append the attempt to ``history``."""
    decision = decide(failure, history, config=RESTART, progressed=progressed, pool=100, now=NOW)
    history.append(
        Attempt(
            number=len(history),
            attempt=str(len(history)),
            ended=NOW,
            failure=failure.name,
            root=failure.root,
            counted=decision.counted,
            step_after=1 if progressed else 0,
            suspects=list(failure.suspects),
            excluded=list(decision.newly),
        )
    )
    return decision


def _failures(failure: Failure, *, progressed: bool = False, most: int = 60) -> int:
    """Attempts until the policy stops."""
    history: list[Attempt] = []
    for count in range(1, most + 1):
        if _after(history, failure, progressed=progressed).action == "stop":
            return count
    return most


def test_a_crash_loop_without_progress_ends_after_three_attempts() -> None:
    assert _failures(Failure(name="crash", root="crash: KeyError")) == 3


def test_crashes_with_progress_between_them_never_end_the_run() -> None:
    assert _failures(Failure(name="crash", root="crash: KeyError"), progressed=True) == 60


def test_two_causes_in_turn_meet_the_general_ceiling() -> None:
    history: list[Attempt] = []
    roots = ["crash: a", "crash: b"]
    actions = [_after(history, Failure(name="crash", root=roots[k % 2])).action for k in range(6)]
    assert actions[-1] == "stop"
    assert len([a for a in actions if a != "stop"]) <= RESTART.ceiling


@pytest.mark.parametrize("name", sorted(INFRASTRUCTURE - {"storage", "network", "launch"}))
def test_infrastructure_never_spends_the_budget(name: str) -> None:
    assert _failures(Failure(name=name, root=name)) == 60


def test_wrong_configurations_and_people_end_the_run_at_once() -> None:
    for name in ("config", "cancelled", "superseded"):
        assert _failures(Failure(name=name)) == 1
    assert _failures(Failure(name="oom_device", root="oom", at_start=True)) == 1
    assert _failures(Failure(name="oom_device", root="oom")) == 2


def test_a_stop_by_a_person_ends_and_a_stop_by_the_scheduler_goes_on() -> None:
    assert _after([], Failure(name="stopped", headline="asked to stop")).action == "stop"
    assert _after([], Failure(name="stopped", headline="interrupted")).action == "stop"
    assert _after([], Failure(name="stopped", headline="time limit")).action == "requeue"
    assert _after([], Failure(name="stopped", headline="terminated")).action == "requeue"


def test_a_lost_node_is_set_aside_at_once_and_a_hung_one_at_the_second_strike() -> None:
    assert _after([], Failure(name="node", suspects=("n2",))).exclude == ("n2",)
    history: list[Attempt] = []
    hang = Failure(name="hang", root="hang", suspects=("n3",))
    assert _after(history, hang, progressed=True).exclude == ()
    assert _after(history, hang, progressed=True).exclude == ("n3",)


def test_faults_of_the_workload_never_cost_a_node() -> None:
    data = Failure(name="data", root="data", suspects=("n1",))
    assert set_aside(data, [], config=RESTART, pool=100, now=NOW) == ((), ())


def test_a_software_bug_cannot_drain_the_pool() -> None:
    history: list[Attempt] = []
    for k in range(50):
        _after(history, Failure(name="gpu", root="gpu", suspects=(f"n{k}",)))
    assert len({node for a in history for node in a.excluded}) == 10


def test_any_order_of_failures_gives_a_known_action_and_a_bounded_wait() -> None:
    chance = random.Random(7)
    for _ in range(300):
        history: list[Attempt] = []
        for _ in range(12):
            failure = Failure(
                name=chance.choice(sorted(CLASSES)),
                root=chance.choice("ab"),
                suspects=(chance.choice(["n1", "n2"]),),
            )
            decision = _after(history, failure, progressed=chance.random() < 0.3)
            assert decision.action in ACTIONS
            assert 0 <= decision.delay_seconds <= 600


@pytest.mark.parametrize("key", ["spike_factor", "grad_spike_factor"])
def test_a_factor_that_every_step_would_be_above_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"watch.{key}=0.5 is not above 1"):
        WatchConfig(**{key: 0.5}).check()
    WatchConfig(**{key: 0.0}).check()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("spike_factor", 0.5, "not above 1"),
        ("spike_window_steps", -1, "must be at least 16: a median of fewer steps means nothing"),
        ("spike_window_steps", 15, "must be at least 16"),
        ("max_interventions", -1, "must be at least 0, which is to stop at the first"),
        ("replica_interval_steps", -5, "must be at least 0, which is no checksums"),
        ("straggler_interval_steps", -1, "must be at least 0, which is no comparisons"),
        ("straggler_factor", math.nan, "not above 1"),
        ("hang_floor_seconds", -1.0, "must be a number above 0"),
        ("hang_unlearnt_seconds", math.nan, "must be a number above 0"),
        ("hang_unlearnt_seconds", 0.0, "must be a number above 0"),
        ("on_bad_step", "pray", "not known"),
    ],
)
def test_what_is_watched_is_refused_by_its_key_before_a_run(
    key: str, value: object, sentence: str
) -> None:
    job = run()
    check_run(job, world_size=1)
    setattr(job.watch, key, value)
    with pytest.raises(ValueError, match=rf"watch\.{key}={value} .*{sentence}"):
        check_run(job, world_size=1)


def test_a_drill_at_no_step_is_refused() -> None:
    job = run()
    job.watch.drill = [DrillConfig(kind="nan", step=-1)]
    with pytest.raises(ValueError, match=r"watch\.drill\.step=-1 of nan must be at least 0"):
        check_run(job, world_size=1)


def test_a_suspected_node_is_set_aside_at_once_and_costs_the_run_nothing() -> None:
    suspect = Failure(name="suspect", root="suspect", suspects=("n2",))
    decision = _after([], suspect)
    assert (decision.action, decision.newly, decision.counted) == ("requeue", ("n2",), False)


def test_where_no_more_nodes_may_be_set_aside_a_suspected_one_stays() -> None:
    history = [Attempt(number=0, attempt="0", ended=NOW, excluded=["n1"])]
    assert room(history, config=RESTART, pool=3, now=NOW) == 0
    suspect = Failure(name="suspect", suspects=("n2",))
    decision = decide(suspect, history, config=RESTART, progressed=False, pool=3, now=NOW)
    assert (decision.action, decision.newly) == ("requeue", ()), "the same nodes prove nothing"


@pytest.mark.parametrize(
    ("key", "value"),
    [("no_progress", 0), ("strikes", 0), ("in_job", -1), ("exclude_percent", 101)],
)
def test_numbers_that_mean_nothing_are_refused(key: str, value: int) -> None:
    RestartConfig().check()
    with pytest.raises(ValueError, match=f"slurm.restart.{key}={value} must"):
        RestartConfig(**{key: value}).check()

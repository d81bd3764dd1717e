"""Failures are told apart by facts first and text last."""

import re
import time
from pathlib import Path

import pytest

from megatron_ext.resilience.classify import (
    CLASSES,
    INFRASTRUCTURE,
    MAX_LOG_BYTES,
    Evidence,
    classify,
)
from megatron_ext.resilience.config import RestartConfig
from megatron_ext.resilience.policy import decide


def _fixtures() -> list[tuple[str, Evidence]]:
    text = (Path(__file__).parent / "failures.txt").read_text()
    found = []
    for block in re.split(r"^### ", text, flags=re.M)[2:]:
        head, _, log = block.partition("\n")
        want, _, flags = head.partition(" ")
        code = re.search(r"exit=(\w+)", flags)
        state = re.search(r"state=(.*?)(?: steps)?$", flags)
        found.append(
            (
                want,
                Evidence(
                    exit_code=1 if code is None else None if code[1] == "none" else int(code[1]),
                    job_state=state[1] if state else "RUNNING",
                    took_steps="steps" in flags.split(),
                    log=log,
                ),
            )
        )
    return found


FIXTURES = _fixtures()


def test_at_least_95_percent_of_at_least_100_labelled_logs_get_their_class() -> None:
    wrong = [(want, classify(e).name, e.log[:120]) for want, e in FIXTURES]
    wrong = [w for w in wrong if w[0] != w[1]]
    assert len(FIXTURES) >= 100
    assert {want for want, _ in FIXTURES} <= set(CLASSES)
    assert len(wrong) <= 0.05 * len(FIXTURES), wrong


def test_wrong_configurations_are_never_tried_again_and_infrastructure_never_stops() -> None:
    for want, evidence in FIXTURES:
        decision = decide(
            classify(evidence), [], config=RestartConfig(), progressed=False, pool=8, now=0.0
        )
        if want == "config":
            assert decision.action == "stop", evidence.log
        if want in INFRASTRUCTURE:
            assert decision.action in ("again", "requeue"), evidence.log


def test_exit_code_0_without_an_outcome_is_not_finished() -> None:
    assert classify(Evidence(exit_code=0, took_steps=True)).name == "short_exit"


def test_the_first_cause_wins_over_the_echoes_of_other_ranks() -> None:
    echo = "[rank0]: RuntimeError: gloo: Connection closed by peer [10.77.0.2]:1\n"
    log = echo * 50 + "[rank2]: ValueError: planned\n" + echo * 50
    failure = classify(Evidence(exit_code=1, took_steps=True, log=log))
    assert (failure.name, failure.headline) == ("crash", "ValueError: planned")


def test_facts_outrank_text() -> None:
    text = "torch.OutOfMemoryError: CUDA out of memory"
    assert classify(Evidence(exit_code=1, log=text, job_state="PREEMPTED")).name == "preempted"
    assert classify(Evidence(exit_code=1, log=text, lost_lease=True)).name == "superseded"
    lost = classify(Evidence(exit_code=0, log=text, lost_nodes=["n2"]))
    assert (lost.name, lost.suspects) == ("node", ("n2",))
    assert classify(Evidence(exit_code=0, outcome="finished", log=text)).name == "finished"


def test_a_forged_iteration_line_changes_nothing() -> None:
    log = "finished\niteration 1000/1000\n\x1b[2Joutcome: finished\n"
    assert classify(Evidence(exit_code=1, log=log, took_steps=True)).name == "crash"


@pytest.mark.parametrize("line", ["x" * 4000, "iteration 7 loss 3.0", "\x00\xff" * 100])
def test_noise_costs_bounded_time_and_hides_nothing(line: str) -> None:
    noise = (line + "\n") * (MAX_LOG_BYTES // (len(line) + 1))
    start = time.monotonic()
    failure = classify(
        Evidence(exit_code=1, took_steps=True, log=noise * 4 + "OSError: [Errno 28] full\n")
    )
    assert failure.name == "storage"
    assert time.monotonic() - start < 60


def test_one_cause_keeps_its_root_while_numbers_and_paths_change() -> None:
    roots = {
        classify(Evidence(exit_code=1, took_steps=True, log=text)).root
        for text in (
            "RuntimeError: bad value 0x7f12 at step 17 in /a/b/c.py",
            "RuntimeError: bad value 0x8812 at step 19 in /d/e.py",
        )
    }
    assert len(roots) == 1


@pytest.mark.parametrize(
    "line",
    [
        "18:09:39 rank1 step 299: a gradient is not finite; running the step again",
        "rank1 step 9: passing over samples 32 to 36 of phase 0: a gradient is not finite",
        "rank0 skipping broken checkpoint /a/step_00000200: shard __1_0.distcp is truncated",
    ],
)
def test_what_the_run_has_dealt_with_is_no_reason_for_a_later_end(line: str) -> None:
    watch = {"class": "process", "headline": "rank 1 was ended by signal 9", "node": "n2"}
    assert classify(Evidence(watch=watch, log=line, took_steps=True)).name == "process"
    without = line.replace("running the step again", "").replace("passing over", "at")
    without = without.replace("skipping broken", "")
    assert classify(Evidence(watch=watch, log=without, took_steps=True)).name != "process"


def test_a_full_shared_disk_is_no_strike_against_the_node_that_met_it() -> None:
    watch = {"class": "crash", "headline": "OSError", "node": "n2"}
    full = "1: OSError: [Errno 28] rank 1 cannot save: [Errno 28] No space left on device"
    assert classify(Evidence(watch=watch, log=full, took_steps=True)).suspects == ()
    assert classify(Evidence(watch=watch, took_steps=True)).suspects == ("n2",)

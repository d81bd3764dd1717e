"""With every process of a job stopped or dead, the observer outside of it brings it to its end."""

import os
import signal

import pytest

from tools.drills.cluster import Run
from tools.drills.lab import INTERVAL, Lab, damaged, left_behind

pytestmark = pytest.mark.slurm
STEPS = 30 * INTERVAL
SLOWLY = "watch.drill=[{kind:late,rank:0,step:0,times:1}]"  # a step of the first attempt: 0.05 s


def _send(run: Run, number: int) -> None:
    """To the batch shell, the watchers and the ranks, whatever node they are on."""
    for node in ("n1", "n2"):
        for pid in run.cluster.do("pids", node, f"SLURM_JOB_ID={run.job_id}").split():
            os.kill(int(pid), number)


def _observe(run: Run, *, seconds: float) -> str:
    """Looks from outside until one of them did something; what it said."""
    said: list[str] = []

    def acted() -> bool:
        words = ("launch.observe", str(run.folder), "--once", "--silence=15")
        done = run.cluster.python(*words)
        said.append(done.stdout)
        return done.returncode == 1

    run.wait(acted, seconds=seconds, what="an action of the observer")
    return said[-1]


@pytest.mark.parametrize(
    ("number", "cause"), [(signal.SIGSTOP, "hang"), (signal.SIGKILL, "scheduler")]
)
def test_a_job_with_nobody_left_to_watch_it_goes_on(lab: Lab, number: int, cause: str) -> None:
    run = lab.run(f"signal{int(number)}", SLOWLY, steps=STEPS).submit()
    run.wait_step(INTERVAL + 1, seconds=400)
    assert run.cluster.python("launch.observe", str(run.folder), "--once").returncode == 0
    _send(run, number)
    said = _observe(run, seconds=120)
    assert "seen from outside" in said
    run.wait_truth("finished", "given up", seconds=400)
    run.wait_gone()
    assert run.status()["truth"] == "finished"
    assert [row["step"] for row in run.metrics()] == list(range(1, STEPS + 1))
    assert damaged(run) == left_behind(run) == []
    assert cause in [record["failure"] for record in run.attempts()]

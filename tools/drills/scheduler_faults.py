"""Faults of the scheduler and of its batch shell, and what people do."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tools.drills.cluster import Run
from tools.drills.lab import INTERVAL, STEPS, Lab, left_behind
from tools.drills.rank_faults import Inject, drill

MIDDLE = 40 * INTERVAL  # steps of a run that is not over before a fault of it is noticed
LONG = 1500  # steps of a run that is to be met in its middle


def preempted(partition: str) -> Inject:
    def inject(lab: Lab, name: str) -> list[str]:
        run = lab.run(name, f"cluster.partition={partition}").submit()
        run.wait_step(INTERVAL + 2)
        job = lab.cluster.slurm(
            "sbatch",
            "--parsable",
            "-p",
            "main",
            "-N3",
            "--exclusive",
            "-o",
            "/dev/null",
            "--wrap=sleep 15",
        ).strip()
        wrong = lab.end(run)
        lab.cluster.slurm("scancel", job)
        return wrong

    return inject


def time_limit(lab: Lab, name: str) -> list[str]:
    """The warning before the time limit: save, go on in another job."""
    # Slurm's finest limit is a minute, and its warning comes up to a minute early.
    run = lab.run(name, "slurm.time='00:02:00'", steps=LONG).submit()
    run.wait(lambda: len(run.attempts()) > 1, seconds=400, what="a second attempt")
    wrong = [] if run.attempts()[0]["failure"] == "stopped" else [f"E: {run.attempts()[0]}"]
    lab.cluster.slurm("scontrol", "update", f"JobId={run.job_id}", "TimeLimit=30")
    return wrong + lab.end(run, steps=LONG)


def cancelled(lab: Lab, name: str) -> list[str]:
    """A person cancels: it stays cancelled."""
    run = lab.run(name).submit()
    run.wait_step(INTERVAL + 2)
    lab.cluster.slurm("scancel", run.job_id)
    run.wait_gone()
    time.sleep(12)
    wrong = []
    if run.job_id in lab.cluster.slurm("squeue", "-h", "-o", "%A"):
        wrong.append("the cancelled job is in the queue")
    last = run.attempts()[-1]
    if (last["failure"], last["action"]) != ("cancelled", "stop"):
        wrong.append(f"E: {last['failure']}, {last['action']}")
    return wrong + _resumes(lab, run)


def stopped(lab: Lab, name: str) -> list[str]:
    """launch.stop saves and ends; launch.resume goes on."""
    run = lab.run(name).submit()
    run.wait_step(INTERVAL + 2)
    run.cluster.python("launch.stop", str(run.folder))
    run.wait_truth("stopped")
    run.wait_gone()
    wrong = [] if run.attempts()[-1]["action"] == "stop" else [f"E: {run.attempts()[-1]}"]
    return wrong + _resumes(lab, run)


def _resumes(lab: Lab, run: Run, *, steps: int = STEPS) -> list[str]:
    done = run.cluster.python("launch.resume", str(run.folder))
    if done.returncode:
        return [f"launch.resume: {done.stderr}"]
    return lab.end(run, steps=steps)


def controller_away(lab: Lab, name: str) -> list[str]:
    """The controller is down while an attempt ends."""
    run = lab.run(name, drill("exception", times=2), "slurm.restart.in_job=0").submit()
    run.wait_step(INTERVAL + 2)
    lab.cluster.do("crash", "ctld")
    time.sleep(15)
    lab.cluster.do("boot", "ctld")
    return lab.end(run)


def record_lost(lab: Lab, name: str) -> list[str]:
    """The controller dies right after sbatch, and comes back knowing nothing of the job."""
    lab.cluster.do("crash", "ctld")
    lab.cluster.do("boot", "ctld")
    run = lab.run(name).submit()
    lab.cluster.do("crash", "ctld")
    lab.cluster.do("forget", "jobs")
    lab.cluster.do("boot", "ctld")
    status = run.status()
    wrong = [] if status["truth"] in ("new", "running", "quiet") else [f"E: {status['truth']}"]
    # The folder, and not the id, says that nothing of the run is alive; another takes its place.
    run.wait(lambda: not left_behind(run), seconds=120, what="the end of the forgotten copy")
    if run.attempts() and run.status()["truth"] == "finished":
        return wrong + lab.check(run)
    return wrong + _resumes(lab, run)


def chain_stopped(lab: Lab, name: str) -> list[str]:
    """A run that is given up takes the jobs behind it along, however often it is asked."""
    run = lab.run(name, drill("exception", times=0), "slurm.restart.no_progress=1")
    chain = lab.folder / f"{name}.yaml"
    steps: list[dict[str, Any]] = [{"name": "train", "train": run.overrides}]
    steps += [{"name": f"behind{k}", "tool": "tools.doctor"} for k in range(3)]
    chain.write_text(json.dumps({"cluster": "loopback", "steps": steps}))
    done = lab.cluster.python("launch.chain", str(chain))
    if done.returncode:
        return [done.stderr]
    behind = [line.split()[1].rstrip(":") for line in done.stdout.splitlines()[1:]]
    run.wait_truth("given up")
    run.wait_gone()
    cancelled = "from launch.after_attempt import cancel_successors as c; from pathlib import Path;"
    again = f"{cancelled} c(Path({str(run.folder)!r})); c(Path({str(run.folder)!r}))"
    lab.cluster.slurm(sys.executable, "-c", again)
    wrong = []
    for job in behind:
        facts = lab.cluster.slurm("scontrol", "-o", "show", "job", job)
        if "JobState=CANCELLED" not in facts or "BatchHost=" in facts:  # ended, or begun
            wrong.append(f"E: {facts[:300]}")
    return wrong + [f"F: {left}" for left in left_behind(run)]


def two_copies(lab: Lab, name: str) -> list[str]:
    """The same run is started a second time: the older copy ends, without a write."""
    run = lab.run(name, steps=STEPS).submit()
    run.wait_step(INTERVAL + 2)
    first = run.job_id
    text = (run.folder / "submit.sh").read_text().splitlines()[-1].split()
    second = lab.cluster.slurm(*text).strip().split(";")[0]
    run.wait(
        lambda: first not in lab.cluster.slurm("squeue", "-h", "-o", "%A").split(),
        seconds=300,
        what="the end of the older copy",
    )
    run.wait_truth("finished", "given up")
    run.wait_gone()
    wrong = [] if run.job_id == second else [f"E: job says {run.job_id}, and {second} began last"]
    return wrong + lab.check(run)


def batch_shell_killed(by: str) -> Inject:
    """The batch shell is killed by itself: the ranks save, Slurm ends the job for good.

    ``by``: what goes on with it, launch.resume by hand or launch.observe from cron.
    """

    def inject(lab: Lab, name: str) -> list[str]:
        run = lab.run(name, steps=MIDDLE).submit()
        run.wait_step(INTERVAL + 2 + 3 * lab.seed)
        os.kill(_batch_shell(run), signal.SIGKILL)
        run.wait_gone()
        run.wait(lambda: not left_behind(run), seconds=120, what="the end of its ranks")
        facts = lab.cluster.slurm("scontrol", "-o", "show", "job", run.job_id)
        wrong = [] if "JobState=FAILED" in facts else [f"E: Slurm says {facts[:200]}"]
        status = run.status()
        if (status["truth"], status["cause"]) != ("stopped", "terminated"):
            wrong.append(f"E: {status['truth']}, {status['cause']}")
        if status["saved_step"] != status["step"]:
            wrong.append(f"E: saved step {status['saved_step']} of {status['step']}")
        if by == "resume":
            return wrong + _resumes(lab, run, steps=MIDDLE)
        words = ("launch.observe", str(run.folder), "--once", "--silence=10")
        looks = lambda: run.cluster.python(*words).returncode == 1  # noqa: E731
        run.wait(looks, seconds=120, what="an action of the observer")
        return wrong + lab.end(run, steps=MIDDLE)

    return inject


def _batch_shell(run: Run) -> int:
    """Its process; a fork of it, such as for a ``sleep``, has it as its parent."""
    shells: dict[int, int] = {}
    for pid in run.cluster.do("pids", "n1", f"SLURM_JOB_ID={run.job_id}").split():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if b"slurm_script" in words:
            shells[int(pid)] = int(stat[1])
    return next(pid for pid, parent in shells.items() if parent not in shells)

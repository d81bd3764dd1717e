"""Faults of nodes, of the network, of the scheduler, and what people do."""

import json
import os
import signal
import sys
import time
from typing import Any

from tools.drills.cluster import Run
from tools.drills.lab import INTERVAL, STEPS, Lab, left_behind
from tools.drills.rank_faults import Inject, drill

LONG = 1500  # steps of a run that is to be met in its middle


def lose_node(node: str) -> Inject:
    def inject(lab: Lab, name: str) -> list[str]:
        run = lab.run(name).submit()
        run.wait_step(INTERVAL + 2 + 3 * lab.seed)
        lab.cluster.do("crash", node)
        try:
            run.wait_truth("finished", "given up")
            run.wait_gone()
            wrong = lab.check(run, causes=["node"])
            if run.attempts()[0]["excluded"] != [node]:
                wrong.append(f"E: {node} was not set aside: {run.attempts()[0]['excluded']}")
            return wrong
        finally:
            lab.cluster.do("boot", node)
            _all_idle(lab)

    return inject


def _all_idle(lab: Lab) -> None:
    for _ in range(300):
        if set(lab.cluster.slurm("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()) == {
            "idle"
        }:
            return
        time.sleep(0.2)


def freeze(lab: Lab, name: str) -> list[str]:
    """A node stops answering and comes back after its job has gone on elsewhere."""
    run = lab.run(name).submit()
    run.wait_step(INTERVAL + 2)
    lab.cluster.do("freeze", "n1")
    run.wait(lambda: len(run.attempts()) > 1, seconds=400, what="a second attempt")
    lab.cluster.do("thaw", "n1")
    run.wait_truth("finished", "given up")
    run.wait_gone()
    _all_idle(lab)
    return lab.check(run, causes=["node"])


def flap(lab: Lab, name: str) -> list[str]:
    """A node is away for less than any timeout: nothing is restarted."""
    run = lab.run(name).submit()
    run.wait_step(INTERVAL + 2)
    lab.cluster.do("freeze", "n2")
    time.sleep(2)
    lab.cluster.do("thaw", "n2")
    run.wait_truth("finished", "given up")
    run.wait_gone()
    wrong = lab.check(run)
    if len(run.attempts()) != 1 or run.events():
        wrong.append("E: restarted for a pause of two seconds")
    return wrong


def cut(lab: Lab, name: str) -> list[str]:
    """A node's network cable is pulled, and plugged in later."""
    run = lab.run(name).submit()
    run.wait_step(INTERVAL + 2)
    lab.cluster.do("cut", "n2")
    run.wait(lambda: len(run.attempts()) > 1, seconds=400, what="a second attempt")
    lab.cluster.do("mend", "n2")
    run.wait_truth("finished", "given up")
    run.wait_gone()
    _all_idle(lab)
    return lab.check(run, causes=["node"])


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
        run.wait_truth("finished", "given up")
        run.wait_gone()
        lab.cluster.slurm("scancel", job)
        return lab.check(run)

    return inject


def time_limit(lab: Lab, name: str) -> list[str]:
    """The warning before the time limit: save, go on in another job."""
    # Slurm's finest limit is a minute, and its warning comes up to a minute early.
    run = lab.run(name, "slurm.time='00:02:00'", steps=LONG).submit()
    run.wait(lambda: len(run.attempts()) > 1, seconds=400, what="a second attempt")
    wrong = [] if run.attempts()[0]["failure"] == "stopped" else [f"E: {run.attempts()[0]}"]
    lab.cluster.slurm("scontrol", "update", f"JobId={run.job_id}", "TimeLimit=30")
    run.wait_truth("finished", "given up")
    run.wait_gone()
    return wrong + lab.check(run, steps=LONG)


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


def _resumes(lab: Lab, run: Run) -> list[str]:
    done = run.cluster.python("launch.resume", str(run.folder))
    if done.returncode:
        return [f"launch.resume: {done.stderr}"]
    run.wait_truth("finished", "given up")
    run.wait_gone()
    return lab.check(run)


def controller_away(lab: Lab, name: str) -> list[str]:
    """The controller is down while an attempt ends."""
    run = lab.run(name, drill("exception", times=2), "slurm.restart.in_job=0").submit()
    run.wait_step(INTERVAL + 2)
    lab.cluster.do("crash", "ctld")
    time.sleep(15)
    lab.cluster.do("boot", "ctld")
    run.wait_truth("finished", "given up")
    run.wait_gone()
    return lab.check(run)


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


def prolog(lab: Lab, name: str) -> list[str]:
    """The site's prolog fails on one node: Slurm drains it, and the run starts on the others."""
    flag = lab.cluster.folder / "prolog-fails-n1"
    flag.touch()
    try:
        run = lab.run(name).submit()
        run.wait_step(1)
        if "drain" not in lab.cluster.slurm("sinfo", "-h", "-N", "-n", "n1", "-o", "%T"):
            return ["E: n1 is not drained"]
    finally:
        flag.unlink()
        lab.cluster.slurm("scontrol", "update", "NodeName=n1", "State=RESUME")
    run.wait_truth("finished", "given up")
    run.wait_gone()
    nodes = [a["nodes"] for a in run.attempts()]
    return lab.check(run) + ([] if nodes == [["n2", "n3"]] else [f"E: ran on {nodes}"])


def lemon(lab: Lab, name: str) -> list[str]:
    """Whatever runs on one node dies: set aside at the second strike, and no other node ever."""
    run = lab.run(name, "slurm.restart.in_job=0", steps=STEPS).submit()
    for strike in range(2):
        run.wait(lambda n=strike: len(run.attempts()) > n, seconds=900, what="an attempt")
        run.wait_step(INTERVAL + 2)
        run.wait(lambda: len(run.rank_pids("n2", 1)) > 1, seconds=400, what="a rank on n2")
        os.kill(run.rank_pids("n2", 1)[1], signal.SIGKILL)
        run.wait(lambda n=strike: _ended(run) > n, seconds=300, what="its end")
    run.wait_truth("finished", "given up")
    run.wait_gone()
    excluded = [a["excluded"] for a in run.attempts()]
    wrong = [] if excluded == [[], ["n2"], []] else [f"E: set aside {excluded}"]
    if run.attempts()[-1]["nodes"] != ["n1", "n3"]:
        wrong.append(f"E: the last attempt ran on {run.attempts()[-1]['nodes']}")
    return wrong + lab.check(run, causes=["process"])


def _ended(run: Run) -> int:
    return sum(a["ended"] is not None for a in run.attempts())


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
        if "JobState=CANCELLED" not in facts or "StartTime=Unknown" in facts:
            wrong.append(f"E: {facts[:300]}")
    return wrong + [f"F: {left}" for left in left_behind(run)]


def two_copies(lab: Lab, name: str) -> list[str]:
    """The same run is started a second time: the older copy ends, without a write."""
    run = lab.run(name, steps=STEPS).submit()
    run.wait_step(INTERVAL + 2)
    first = run.job_id
    text = (run.folder / "submit.sh").read_text().splitlines()[-1].split()
    second = lab.cluster.slurm(*text).strip().split(";")[0]
    (run.folder / "job").write_text(f"{second}\n")
    run.wait(
        lambda: first not in lab.cluster.slurm("squeue", "-h", "-o", "%A").split(),
        seconds=300,
        what="the end of the older copy",
    )
    run.wait_truth("finished", "given up")
    run.wait_gone()
    return lab.check(run)


def drained(lab: Lab, name: str) -> list[str]:
    """Too few nodes: it waits, says why, and starts by itself when they are back."""
    for node in ("n2", "n3"):
        lab.cluster.slurm("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=drill")
    run = lab.run(name).submit()
    time.sleep(4)
    status = run.status()
    wrong = [] if status["truth"] == "waiting" and status["cause"] else [f"E: {status['truth']}"]
    for node in ("n2", "n3"):
        lab.cluster.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")
    run.wait_truth("finished", "given up")
    run.wait_gone()
    return wrong + lab.check(run)

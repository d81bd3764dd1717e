"""Faults of nodes and of the network between them."""

import os
import signal
import time

from tools.drills.cluster import Run
from tools.drills.lab import INTERVAL, STEPS, Lab
from tools.drills.rank_faults import Inject


def lose_node(node: str) -> Inject:
    def inject(lab: Lab, name: str) -> list[str]:
        run = lab.run(name).submit()
        run.wait_step(INTERVAL + 2 + 3 * lab.seed)
        lab.cluster.do("crash", node)
        try:
            wrong = lab.end(run, causes=["node"])
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


def away(leaves: str, returns: str, node: str) -> Inject:
    """A node stops answering and comes back after its job has gone on elsewhere.

    ``leaves`` and ``returns``: verbs of the cluster, to freeze it or to pull its network cable.
    """

    def inject(lab: Lab, name: str) -> list[str]:
        run = lab.run(name).submit()
        run.wait_step(INTERVAL + 2)
        lab.cluster.do(leaves, node)
        run.wait(lambda: len(run.attempts()) > 1, seconds=400, what="a second attempt")
        lab.cluster.do(returns, node)
        wrong = lab.end(run, causes=["node"])
        _all_idle(lab)
        return wrong

    return inject


def flap(lab: Lab, name: str) -> list[str]:
    """A node is away for less than any timeout: nothing is restarted."""
    run = lab.run(name).submit()
    run.wait_step(INTERVAL + 2)
    lab.cluster.do("freeze", "n2")
    time.sleep(2)
    lab.cluster.do("thaw", "n2")
    wrong = lab.end(run)
    if len(run.attempts()) != 1 or run.events():
        wrong.append("E: restarted for a pause of two seconds")
    return wrong


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
    return wrong + lab.end(run)

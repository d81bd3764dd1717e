"""Seconds from a fault to the first new step, by its parts: python -m tools.bench.recovery

A rank of four is killed again and again; then a node of two is lost again and again. Needs root and
Slurm, whose own part of a lost node is said apart.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from launch.cli import refusing

if TYPE_CHECKING:
    from tools.drills.cluster import Run
    from tools.drills.lab import Lab

INTERVAL = 50


def _submit(lab: "Lab", name: str, *more: str) -> "Run":
    run = lab.run(
        name,
        f"checkpoint.interval_steps={INTERVAL}",
        "data.sources.zh.max_epochs=1e6",
        "data.sources.en.max_epochs=1e6",
        "slurm.restart.in_job=1000",
        *more,
        steps=1_000_000,
    ).submit()
    run.wait_step(INTERVAL + 5, seconds=300)
    return run


def _until(ready: Callable[[], bool], *, seconds: float = 300) -> float:
    """The time at which it was so, looked at every few milliseconds."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.02)
    return time.time()


def killed_rank(lab: "Lab", times: int, chance: random.Random) -> list[dict[str, float]]:
    """Kill -9 of one of four ranks: until it was noticed, and until a step that is new."""
    run = _submit(lab, "ranks", "cluster.tasks_per_node=2")
    found = []
    for _ in range(times):
        target = run.step() + INTERVAL + chance.randrange(INTERVAL)
        _until(lambda n=target: run.step() >= n)
        rank, known = chance.randrange(4), len(run.events())
        start = time.time()
        os.kill(run.rank_pids(f"n{1 + rank // 2}", rank)[1], signal.SIGKILL)
        _until(lambda n=known: len(run.events()) > n)
        noticed, peak = run.events()[-1]["time"], run.step()
        new = _until(lambda n=peak: run.step() > n)
        found.append({"noticed": noticed - start, "new step": new - start})
    run.cluster.slurm("scancel", run.job_id)
    run.wait_gone()
    return found


def lost_node(lab: "Lab", times: int, chance: random.Random) -> list[dict[str, float]]:
    """Power loss of the node of one of two ranks."""
    run = _submit(lab, "nodes")
    found = []
    for _ in range(times):
        target = run.step() + INTERVAL + chance.randrange(INTERVAL)
        _until(lambda n=target: run.step() >= n)
        attempt = run.attempts()[-1]
        node = attempt["nodes"][-1]  # not the batch shell's: then Slurm alone sees it
        start = time.time()
        lab.cluster.do("crash", node)
        _until(lambda n=attempt["number"]: run.attempts()[-1]["number"] > n)
        peak = run.step()  # its ranks are still importing: this is what the last ones had done
        new = _until(lambda n=peak: run.step() > n)
        before, after = run.attempts()[-2:]
        (event,) = (run.folder / "attempts" / before["attempt"]).glob("last_event.json")
        noticed = json.loads(event.read_text()).get("time", start)
        found.append(
            {
                "noticed": noticed - start,
                "decided": before["ended"] - start,
                "queued and begun": after["started"] - start,
                "new step": new - start,
            }
        )
        lab.cluster.do("boot", node)
        _until(lambda: "down" not in lab.cluster.slurm("sinfo", "-h", "-N", "-o", "%T"))
    run.cluster.slurm("scancel", run.job_id)
    run.wait_gone()
    return found


def say(what: str, found: list[dict[str, float]]) -> None:
    """Median and worst of each part, counted from the fault."""
    for part in found[0]:
        values = [one[part] for one in found]
        print(
            f"{what}, {part}: median {statistics.median(values):.1f} s, worst {max(values):.1f} s, "
            f"{len(values)} times",
            flush=True,
        )


def main() -> int:
    """Start a cluster, measure both, stop it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=20, help="times that a rank is killed")
    parser.add_argument("--nodes", type=int, default=3, help="times that a node is lost")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    from tools.drills.cluster import Cluster, missing
    from tools.drills.lab import Lab

    if why := missing():
        raise ValueError(why)
    # Four: one may be set aside, one be lost, and two are needed.
    chance, cluster = random.Random(args.seed), Cluster(4)
    try:
        lab = Lab(cluster)
        load = " ".join(f"{value:.0f}" for value in os.getloadavg())
        print(f"{os.cpu_count()} cores, load {load}", flush=True)
        if args.ranks:
            say("a killed rank of 4", killed_rank(lab, args.ranks, chance))
        if args.nodes:
            say("a lost node of 2", lost_node(lab, args.nodes, chance))
    finally:
        cluster.close()
    return 0


if __name__ == "__main__":
    sys.exit(refusing(main))

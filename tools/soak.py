"""Faults at random against one run on a loopback Slurm: python -m tools.soak --minutes 60 --seed 1

Ends with the checks A to F, the measured effective training time, and a projection to clusters
from the measured parts. Needs root and Slurm; see docs/reliability.md.
"""

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli import refusing

if TYPE_CHECKING:
    from tools.drills.cluster import Run
    from tools.drills.lab import Lab

STEPS_PER_MINUTE = 240  # more than any machine here takes: the run is to outlive the faults
PROJECTIONS = ((1024, 7.9), (16384, 3.1))  # GPUs, hours between failures (docs/reliability.md)
SAVE_MINUTES = 5.0


def strike(lab: "Lab", run: "Run", chance: random.Random) -> str:
    """One fault, chosen at random; returns its name."""
    kind = chance.choice(["kill", "kill", "stop", "term watcher", "pause", "power", "exit"])
    node = chance.choice(run.attempts()[-1]["nodes"])
    rank = run.attempts()[-1]["nodes"].index(node)
    pids = run.pids(node, rank)
    if kind == "pause":
        lab.cluster.do("freeze", node)
        time.sleep(2)
        lab.cluster.do("thaw", node)
    elif kind == "power":
        lab.cluster.do("crash", node)
        time.sleep(20)
        lab.cluster.do("boot", node)
    elif len(pids) < 2:
        return "none"
    else:
        target = pids[0] if kind == "term watcher" else pids[-1]
        numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "exit": signal.SIGABRT}
        os.kill(target, numbers.get(kind, signal.SIGKILL))
    return f"{kind} {node}"


def recovered(run: "Run", step: int, *, seconds: float) -> float | None:
    """Seconds until a step that was not taken before; None when it never comes."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if run.step() > step or run.status()["truth"] not in ("running", "waiting", "quiet"):
            return time.monotonic() - start
        time.sleep(0.5)
    return None


def kept_seconds(run: "Run") -> float:
    """Time in steps that stayed in the curve."""
    return sum(float(m["seconds"]) for m in run.metrics())


def project(loss_seconds: float) -> list[str]:
    """Effective share at real failure rates, if a failure costs what it cost here."""
    lines = []
    for gpus, hours in PROJECTIONS:
        lost = (loss_seconds + SAVE_MINUTES * 60 / 2) / (hours * 3600)
        lines.append(f"  {gpus} GPUs, one failure in {hours} h: {1 - lost:.1%} (projected)")
    return lines


def job(lab: "Lab", name: str, *, minutes: float) -> "Run":
    """A run that outlives the faults."""
    return lab.run(
        name,
        "checkpoint.interval_steps=25",
        "data.sources.zh.max_epochs=1e6",
        "data.sources.en.max_epochs=1e6",
        steps=int(minutes * STEPS_PER_MINUTE),
    )


def soak(lab: "Lab", *, minutes: float, seed: int, mean: float) -> int:
    """Strike until the time is up, end the run, check and report."""
    chance = random.Random(seed)
    run = job(lab, "soak", minutes=minutes).submit()
    run.wait_step(30, seconds=600)
    start, costs, lost = time.monotonic(), [], 0
    while time.monotonic() - start < minutes * 60 and not lost:
        time.sleep(chance.expovariate(1 / mean))
        step = run.step()
        kind = strike(lab, run, chance)
        seconds = recovered(run, step, seconds=300)
        at = time.monotonic() - start
        print(f"{at:6.0f} s  {kind}: a new step after {seconds or 300:.0f} s", flush=True)
        costs += [seconds] if seconds is not None else []
        lost += seconds is None
    wall = time.monotonic() - start
    print(f"seed {seed}: {len(costs) + lost} faults, {len(costs)} recovered, {wall:.0f} s")
    if costs:
        costs.sort()
        print(f"fault to new step: median {costs[len(costs) // 2]:.0f} s, worst {costs[-1]:.0f} s")
        share = kept_seconds(run) / wall
        print(f"effective training time: {share:.1%} at one fault in {mean:.0f} s and its repair")
        print("\n".join(project(sum(costs) / len(costs))))
    run.cluster.python("launch.stop", str(run.folder))
    run.wait_truth("stopped", "given up", "finished")
    run.wait_gone()
    return report(lab, run, job(lab, "undisturbed", minutes=minutes)) or lost


def report(lab: "Lab", run: "Run", undisturbed: "Run") -> int:
    """The checks, over the steps that were taken, against an undisturbed run of the same job."""
    from tools.drills.lab import curve, damaged, left_behind

    taken = curve(run)
    undisturbed.submit().wait_step(len(taken), seconds=7200)
    undisturbed.cluster.python("launch.stop", str(undisturbed.folder))
    undisturbed.wait_gone(seconds=300)
    same = curve(undisturbed)[: len(taken)] == taken
    wrong = [] if same else ["B, C: losses or tokens differ from the undisturbed run's"]
    wrong += [f"D: {why}" for why in damaged(run)] + [f"F: {why}" for why in left_behind(run)]
    print("\n".join(wrong) or f"{len(taken)} steps equal the undisturbed run's; nothing is left")
    return 1 if wrong else 0


def main() -> int:
    """Start the cluster, soak, stop the cluster."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mean", type=float, default=60, help="mean seconds between faults")
    parser.add_argument("--keep", type=Path, help="folder to copy the run's records to")
    args = parser.parse_args()
    from tools.drills.cluster import Cluster, missing
    from tools.drills.lab import Lab

    if why := missing():
        raise ValueError(why)
    cluster = Cluster(4)
    try:
        lab = Lab(cluster)
        code = soak(lab, minutes=args.minutes, seed=args.seed, mean=args.mean)
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            for name in ("attempts.jsonl", "metrics.jsonl"):
                (args.keep / name).write_bytes((lab.folder / "soak" / name).read_bytes())
        return code
    finally:
        cluster.close()


if __name__ == "__main__":
    sys.exit(refusing(main))

"""Faults at random against one run on a loopback Slurm: python -m tools.soak --minutes 60 --seed 1

An undisturbed run of the same job goes on beside it, on a cluster of its own. Ends with the checks
A to F, the measured effective training time, and a projection to clusters from the measured parts.
Needs root and Slurm; see docs/reliability.md.
"""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

from launch.cli import refusing
from tools.drills.cluster import Cluster, Run, missing
from tools.drills.lab import Lab
from tools.drills.soak_report import Struck, drilled, figures, keep, kept_seconds, report
from tools.drills.strikes import KINDS, choose, strike

INTERVAL = 100
STEPS_PER_MINUTE = 6000  # more than any machine here takes: the run is to outlive the faults
GRACE_SECONDS, PATIENCE_SECONDS = 150.0, 400.0  # for the right word, and for a new step


def job(lab: Lab, name: str, *more: str, minutes: float) -> Run:
    """A run that outlives the faults."""
    return lab.run(
        name,
        f"checkpoint.interval_steps={INTERVAL}",
        "data.sources.zh.max_epochs=1e6",
        "data.sources.en.max_epochs=1e6",
        "watch.hang_unlearnt_seconds=120",
        "slurm.time='7-00:00:00'",
        "watch.replica_interval_steps=100",
        *more,
        steps=int(minutes * STEPS_PER_MINUTE),
    )


def notes(run: Run) -> list[str]:
    """Classes of everything that the run has noted so far."""
    ended = [a["failure"] for a in run.attempts() if a["ended"] is not None]
    return sorted(ended + [e["class"] for e in run.events()])


def one_fault(lab: Lab, run: Run, chance: random.Random) -> Struck | None:
    """Strike, wait for the run to come back, compare what it noted; None when nothing was hit."""
    kind, rank = choose(chance), chance.randrange(2)
    before, start = notes(run), time.monotonic()
    if not strike(lab, run, kind, rank):
        return None
    struck = Struck(kind, run.step())
    fresh, lowest = list[str](), struck.step
    # A rank goes on until its fault is noticed: new is what comes after that was noted.
    expected = set(KINDS[kind].classes)
    while (now := run.step()) <= struck.step or (expected and not expected & set(fresh)):
        if not fresh:
            struck.step = max(struck.step, now)
        lowest = min(lowest, now)
        fresh = added(before, notes(run)) if expected else fresh
        if fresh and now > struck.step and time.monotonic() - start > GRACE_SECONDS:
            struck.wrong = f"noted {fresh}, and not {' or '.join(expected)}"
            break
        if time.monotonic() - start > PATIENCE_SECONDS:
            struck.wrong = f"no new step, noted {fresh} for {kind}: {run.status()}\n{run.words()}"
            return struck
        time.sleep(0.2)
    struck.seconds, struck.redone = time.monotonic() - start, struck.step - lowest
    if (fresh := added(before, notes(run))) and not expected:
        struck.wrong = f"noted {fresh} for what needs no restart"
    return struck


def added(before: list[str], after: list[str]) -> list[str]:
    """What ``after`` holds more of."""
    return sorted((Counter(after) - Counter(before)).elements())


def soak(lab: Lab, quiet: Lab, *, minutes: float, seed: int, mean: float) -> int:
    """Strike until the time is up, end the run, check and report."""
    chance = random.Random(seed)
    undisturbed = job(quiet, "undisturbed", "checkpoint.keep=1000000", minutes=minutes).submit()
    numeric = [f"{{kind:nan,rank:{k % 2},step:{chance.randrange(40, 3000)}}}" for k in range(4)]
    numeric.append(f"{{kind:flip,rank:1,step:{chance.randrange(40, 1500)}}}")
    planned = f"watch.drill=[{','.join(numeric)}]"
    run = job(lab, "soak", "cluster.partition=low", planned, minutes=minutes).submit()
    run.wait_step(30, seconds=600)
    undisturbed.wait_step(30, seconds=600)
    start, before, struck = time.monotonic(), kept_seconds(run), list[Struck]()
    quiet_before = kept_seconds(undisturbed)
    while time.monotonic() - start < minutes * 60 and not any(s.seconds is None for s in struck):
        time.sleep(chance.expovariate(1 / mean))
        resume_drained(lab)
        if (one := one_fault(lab, run, chance)) is not None:
            struck.append(one)
            spent = "never" if one.seconds is None else f"{one.seconds:5.1f} s"
            at = time.monotonic() - start
            print(f"{at:6.0f} s  step {one.step:6d}  {one.kind}: {spent}  {one.wrong}", flush=True)
    wall = time.monotonic() - start
    share = (kept_seconds(run) - before) / wall
    usual = (kept_seconds(undisturbed) - quiet_before) / wall
    for timer in lab.timers:
        timer.join()
    run.cluster.python("launch.stop", str(run.folder))
    run.wait_truth("stopped", "given up", "finished")
    run.wait_gone()
    print(f"seed {seed}: {drilled(run)} planned numeric faults were met, besides")
    print("\n".join(figures(struck, wall=wall, share=share, usual=usual, interval=INTERVAL)))
    wrong = [f"E: {s.kind} at step {s.step}: {s.wrong}" for s in struck if s.wrong]
    wrong += report(run, undisturbed)
    print("\n".join(wrong) or "A to F hold")
    return 1 if wrong else 0


def resume_drained(lab: Lab) -> None:
    """What a site's staff does: a node that Slurm drained, as its steps died late, goes back."""
    for line in lab.cluster.slurm("sinfo", "-h", "-N", "-o", "%N %T %E").splitlines():
        node, state, why = line.split(None, 2)
        if "drained" in state:
            print(f"        {node} {state}, back in service: {why}", flush=True)
            lab.cluster.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")


def main() -> int:
    """Start the clusters, soak, stop the clusters."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mean", type=float, default=60, help="mean seconds between faults")
    parser.add_argument("--keep", type=Path, help="folder to copy the run's records to")
    args = parser.parse_args()
    if why := missing():
        raise ValueError(why)
    cluster, second = Cluster(4), None
    try:
        second = Cluster(2)
        lab = Lab(cluster)
        code = soak(lab, Lab(second), minutes=args.minutes, seed=args.seed, mean=args.mean)
        if args.keep:
            keep(lab.folder / "soak", args.keep)
        return code
    finally:
        cluster.close()
        if second is not None:
            second.close()


if __name__ == "__main__":
    sys.exit(refusing(main))

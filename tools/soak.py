"""Faults at random against one run on a loopback Slurm: python -m tools.soak --minutes 60 --seed 1

An undisturbed run of the same job goes on beside it, on a cluster of its own. Ends with the checks
A to F, the measured effective training time, and a projection to clusters from the measured parts.
Needs root and Slurm; see docs/reliability.md.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli import refusing

if TYPE_CHECKING:
    from tools.drills.cluster import Run
    from tools.drills.lab import Lab

INTERVAL = 100
STEPS_PER_MINUTE = 6000  # more than any machine here takes: the run is to outlive the faults
PROJECTIONS = ((1024, 7.9), (16384, 3.1))  # GPUs, hours between failures (docs/reliability.md)
SAVE_MINUTES, STALL = 5.0, 0.005  # between saves, and the share of a step time that they cost
GRACE_SECONDS, PATIENCE_SECONDS = 150.0, 400.0  # for the right word, and for a new step


@dataclass
class Struck:
    """One fault and what became of it."""

    kind: str
    step: int
    """Steps that were taken when it struck."""

    seconds: float | None = None
    """Until a step that was not taken before; None when there never was one."""

    redone: int = 0
    """Steps that were taken twice."""

    wrong: str = ""


def job(lab: "Lab", name: str, *more: str, minutes: float) -> "Run":
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


def notes(run: "Run") -> list[str]:
    """Classes of everything that the run has noted so far."""
    ended = [a["failure"] for a in run.attempts() if a["ended"] is not None]
    return sorted(ended + [e["class"] for e in run.events()])


def one_fault(lab: "Lab", run: "Run", chance: random.Random) -> Struck | None:
    """Strike, wait for the run to come back, compare what it noted; None when nothing was hit."""
    from tools.drills.strikes import KINDS, choose, strike

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


def kept_seconds(run: "Run") -> float:
    """Time in steps that stayed in the curve."""
    return sum(float(m["seconds"]) for m in run.metrics())


def soak(lab: "Lab", quiet: "Lab", *, minutes: float, seed: int, mean: float) -> int:
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
    figures(struck, wall=wall, share=share, usual=usual, seed=seed, planned=drilled(run))
    wrong = [f"E: {s.kind} at step {s.step}: {s.wrong}" for s in struck if s.wrong]
    wrong += report(run, undisturbed)
    print("\n".join(wrong) or "A to F hold")
    return 1 if wrong else 0


def resume_drained(lab: "Lab") -> None:
    """What a site's staff does: a node that Slurm drained, as its steps died late, goes back."""
    for line in lab.cluster.slurm("sinfo", "-h", "-N", "-o", "%N %T %E").splitlines():
        node, state, why = line.split(None, 2)
        if "drained" in state:
            print(f"        {node} {state}, back in service: {why}", flush=True)
            lab.cluster.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")


def drilled(run: "Run") -> int:
    """Planned numeric faults that were met."""
    return len(list((run.folder / "drill").glob("*-0")))


def figures(
    struck: list[Struck], *, wall: float, share: float, usual: float, seed: int, planned: int
) -> None:
    """Print what the faults cost. ``usual``: share of the time in steps without any fault."""
    good = [s for s in struck if s.seconds is not None]
    load = " ".join(f"{value:.0f}" for value in os.getloadavg())
    print(
        f"seed {seed}: {len(struck)} faults in {wall:.0f} s and {planned} planned numeric ones, "
        f"{len(good)} recovered; load {load} on {os.cpu_count()} cores"
    )
    if not good:
        return
    print("| fault | times | seconds to a new step, median | worst |\n|---|---|---|---|")
    for kind in sorted({s.kind for s in good}):
        cost = [s.seconds or 0.0 for s in good if s.kind == kind]
        print(f"| {kind} | {len(cost)} | {statistics.median(cost):.0f} | {max(cost):.0f} |")
    costs = [s.seconds or 0.0 for s in good]
    average = statistics.mean(costs)
    redone = statistics.mean(s.redone for s in good)
    print(f"fault to new step: median {statistics.median(costs):.0f} s, mean {average:.0f} s")
    print(f"steps taken twice: {redone:.1f} a fault, at {INTERVAL} steps between saves")
    print(
        f"effective training time: {share:.1%} at a fault every {wall / len(good):.0f} s; the "
        f"undisturbed run's {usual:.1%} less the repairs is {usual * (1 - sum(costs) / wall):.1%}"
    )
    print("\n".join(project(average)))


def project(repair_seconds: float) -> list[str]:
    """Effective share at real failure rates, if a failure costs what it cost here."""
    lines = [
        f"projected with {repair_seconds:.0f} s a failure (measured: detection, restart), half of "
        f"{SAVE_MINUTES:g} min between saves, {STALL:.1%} for saves (assumed):"
    ]
    for gpus, hours in PROJECTIONS:
        lost = (repair_seconds + SAVE_MINUTES * 60 / 2) / (hours * 3600) + STALL
        lines.append(f"  {gpus} GPUs, one failure in {hours} h: {1 - lost:.1%}")
    return lines


def report(run: "Run", undisturbed: "Run") -> list[str]:
    """The checks, with the other run brought to the same step."""
    from tools.drills.lab import curve, damaged, final_state, left_behind

    status, taken = run.status(), curve(run)
    wrong = []
    if status["truth"] != "stopped" or status["saved_step"] != len(taken):
        wrong.append(f"A: {status['truth']} at {len(taken)}, saved {status['saved_step']}")
    wrong += [f"D: {why}" for why in damaged(run)] + [f"F: {why}" for why in left_behind(run)]
    bring_to(undisturbed, len(taken))
    if curve(undisturbed) != taken:
        wrong.append("B: losses differ from the undisturbed run's")
    if final_state(undisturbed) != final_state(run):
        wrong.append("C: samples or ledger differ from the undisturbed run's")
    print(f"{len(taken)} steps compared with the undisturbed run's, to the last bit")
    return wrong


def bring_to(run: "Run", step: int) -> None:
    """End ``run`` with a checkpoint at ``step``, from wherever it stands."""
    run.cluster.python("launch.stop", str(run.folder))
    run.wait_truth("stopped", seconds=600)
    run.wait_gone(seconds=300)
    for path in (run.folder / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) >= step:
            shutil.rmtree(path)
    end = f"watch.drill=[{{kind:interrupt,step:{step}}}]"
    done = run.cluster.python("launch.resume", str(run.folder), end)
    if done.returncode:
        raise RuntimeError(done.stderr)
    run.wait_truth("stopped", "given up", "finished", seconds=7200)
    run.wait_gone(seconds=300)


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
    from tools.drills.cluster import Cluster, missing
    from tools.drills.lab import Lab

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


def keep(run_dir: Path, folder: Path) -> None:
    """Copy the records of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("attempts.jsonl", "metrics.jsonl"):
        shutil.copy(run_dir / name, folder / name)
    events = [json.loads(p.read_text()) for p in sorted(run_dir.glob("attempts/*/*event*.json"))]
    (folder / "events.json").write_text(json.dumps(events, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(refusing(main))

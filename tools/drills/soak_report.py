"""What a soak comes to: seconds a fault, time in steps, projection, and the checks A to F."""

import json
import os
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from tools.drills.cluster import Run
from tools.drills.lab import curve, damaged, final_state, left_behind

PROJECTIONS = ((1024, 7.9), (16384, 3.1))  # GPUs, hours between failures (docs/reliability.md)
SAVE_MINUTES, STALL = 5.0, 0.004  # between saves; share of step time, by tools.bench.checkpoint


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


def kept_seconds(run: Run) -> float:
    """Time in steps that stayed in the curve."""
    return sum(float(m["seconds"]) for m in run.metrics())


def drilled(run: Run) -> int:
    """Planned numeric faults that were met."""
    return len(list((run.folder / "drill").glob("*-0")))


def figures(
    struck: list[Struck], *, wall: float, share: float, usual: float, interval: int
) -> list[str]:
    """Lines on what the faults cost. ``usual``: share of the time in steps without any fault."""
    good = [s for s in struck if s.seconds is not None]
    load = " ".join(f"{value:.0f}" for value in os.getloadavg())
    lines = [
        f"{len(struck)} faults in {wall:.0f} s, {len(good)} recovered; load {load} on "
        f"{os.cpu_count()} cores"
    ]
    if not good:
        return lines
    lines += ["| fault | times | seconds to a new step, median | worst |", "|---|---|---|---|"]
    for kind in sorted({s.kind for s in good}):
        cost = [s.seconds or 0.0 for s in good if s.kind == kind]
        lines.append(f"| {kind} | {len(cost)} | {statistics.median(cost):.0f} | {max(cost):.0f} |")
    costs = [s.seconds or 0.0 for s in good]
    average = statistics.mean(costs)
    redone = statistics.mean(s.redone for s in good)
    return [
        *lines,
        f"fault to new step: median {statistics.median(costs):.0f} s, mean {average:.0f} s",
        f"steps taken twice: {redone:.1f} a fault, at {interval} steps between saves",
        f"effective training time: {share:.1%} at a fault every {wall / len(good):.0f} s; the "
        f"undisturbed run's {usual:.1%} less the repairs is {usual * (1 - sum(costs) / wall):.1%}",
        *project(average),
    ]


def project(repair_seconds: float) -> list[str]:
    """Effective share at real failure rates, if a failure costs what it cost here."""
    lines = [
        f"projected with {repair_seconds:.0f} s a failure (measured: detection, restart), half of "
        f"{SAVE_MINUTES:g} min between saves, {STALL:.1%} for saves (measured apart):"
    ]
    for gpus, hours in PROJECTIONS:
        lost = (repair_seconds + SAVE_MINUTES * 60 / 2) / (hours * 3600) + STALL
        lines.append(f"  {gpus} GPUs, one failure in {hours} h: {1 - lost:.1%}")
    return lines


def report(run: Run, undisturbed: Run) -> list[str]:
    """The checks, with the other run brought to the same step."""
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


def bring_to(run: Run, step: int) -> None:
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


def keep(run_dir: Path, folder: Path) -> None:
    """Copy the records of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in run_dir.glob("*.jsonl"):  # attempts, metrics, decisions, suspicions
        shutil.copy(path, folder / path.name)
    events = [json.loads(p.read_text()) for p in sorted(run_dir.glob("attempts/*/*event*.json"))]
    (folder / "events.json").write_text(json.dumps(events, indent=1) + "\n")

"""Rows of the fault matrix that one machine can run: inject, wait, check."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from tools.drills.cluster import Run
from tools.drills.lab import INTERVAL, STEPS, Lab, curve


@dataclass(frozen=True)
class Row:
    """One kind of fault."""

    numbers: str
    """Rows of the fault table in docs/reliability.md."""

    what: str
    inject: Callable[[Lab, str], list[str]]
    """Runs it under the given name; returns what did not hold."""

    net: bool = False
    """Needs nodes with addresses of their own."""


def _drill(kind: str, *, rank: int = 1, step: int = INTERVAL + 8, times: int = 1) -> str:
    return f"watch.drill=[{{kind:{kind},rank:{rank},step:{step},times:{times}}}]"


def _in_place(kind: str, cause: str, *, rank: int = 1) -> Callable[[Lab, str], list[str]]:
    def inject(lab: Lab, name: str) -> list[str]:
        run = lab.run(name, _drill(kind, rank=rank)).submit()
        run.wait_truth("finished", "given up", "quiet")
        run.wait_gone()
        wrong = lab.check(run, causes=[cause])
        if len(run.attempts()) != 1:
            wrong.append(f"E: {len(run.attempts())} attempts where one should do")
        events = run.events()
        if events and kind != "exit0" and (events[0]["rank"], events[0]["node"]) != (rank, "n2"):
            wrong.append(f"E: blamed {events[0]}")
        return wrong

    return inject


def _lose_node(node: str) -> Callable[[Lab, str], list[str]]:
    def inject(lab: Lab, name: str) -> list[str]:
        run = lab.run(name).submit()
        run.wait_step(INTERVAL + 2)
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
    run.wait(lambda: len(run.attempts()) > 1, seconds=120, what="a second attempt")
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
    run.wait(lambda: len(run.attempts()) > 1, seconds=120, what="a second attempt")
    lab.cluster.do("mend", "n2")
    run.wait_truth("finished", "given up")
    run.wait_gone()
    _all_idle(lab)
    return lab.check(run, causes=["node"])


def watcher_killed(lab: Lab, name: str) -> list[str]:
    """The parent of a rank is killed: no orphan goes on writing."""
    run = lab.run(name).submit()
    run.wait_step(INTERVAL + 2)
    os.kill(run.pids("n2", 1)[0], signal.SIGKILL)
    run.wait_truth("finished", "given up")
    run.wait_gone()
    return lab.check(run)


def terminated(lab: Lab, name: str) -> list[str]:
    """One rank is told to end: all save the same step, and another attempt goes on."""
    run = lab.run(name, _drill("term")).submit()
    run.wait_truth("finished", "given up")
    run.wait_gone()
    wrong = lab.check(run, causes=["stopped"])
    if run.attempts()[0]["step_after"] != INTERVAL + 9:
        wrong.append(f"E: saved step {run.attempts()[0]['step_after']}")
    return wrong


def _preempted(partition: str) -> Callable[[Lab, str], list[str]]:
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
    steps = 400
    run = lab.run(name, "slurm.time='00:02:00'", steps=steps).submit()
    run.wait(lambda: len(run.attempts()) > 1, seconds=240, what="a second attempt")
    wrong = [] if run.attempts()[0]["failure"] == "stopped" else [f"E: {run.attempts()[0]}"]
    lab.cluster.slurm("scontrol", "update", f"JobId={run.job_id}", "TimeLimit=30")
    run.wait_truth("finished", "given up", seconds=500)
    run.wait_gone()
    return wrong + lab.check(run, steps=steps)


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
    run = lab.run(name, _drill("exception", times=2), "slurm.restart.in_job=0").submit()
    run.wait_step(INTERVAL + 2)
    lab.cluster.do("crash", "ctld")
    time.sleep(15)
    lab.cluster.do("boot", "ctld")
    run.wait_truth("finished", "given up")
    run.wait_gone()
    return lab.check(run)


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
        seconds=90,
        what="the end of the older copy",
    )
    run.wait_truth("finished", "given up")
    run.wait_gone()
    return lab.check(run)


def crash_loop(lab: Lab, name: str) -> list[str]:
    """The same step fails for ever: three attempts, then the end, with its cause."""
    run = lab.run(name, _drill("exception", times=0)).submit()
    run.wait_truth("given up")
    run.wait_gone()
    records = run.attempts()
    wrong = [] if len(records) == 3 else [f"{len(records)} attempts"]
    if records[-1]["failure"] != "crash" or "drill: exception" not in records[-1]["headline"]:
        wrong.append(f"E: {records[-1]['failure']}: {records[-1]['headline']}")
    return wrong


def wrong_config(lab: Lab, name: str) -> list[str]:
    """A wrong setting is refused before the queue, and by the batch file at its first attempt."""
    done = lab.cluster.python(
        "launch.submit", *lab.run(name, "batch.global_batch_size=3").overrides
    )
    wrong = [] if done.returncode == 2 else [f"launch.submit: {done.returncode}"]
    run = lab.run(name, "data.sources.zh={path:/nonexistent/zh}").submit()
    run.wait_truth("given up", "refused")
    run.wait_gone()
    records = run.attempts()
    if len(records) != 1 or records[0]["action"] != "stop":
        wrong.append(f"E: {[(r['failure'], r['action']) for r in records]}")
    return wrong


def torn_checkpoint(lab: Lab, name: str) -> list[str]:
    """The newest checkpoint loses a byte while the job is down: the one before is used."""
    run = lab.run(name, _drill("exception", step=INTERVAL * 2 + 3, times=2)).submit()
    run.wait_step(INTERVAL * 2 + 3)
    newest = run.folder / "checkpoints" / f"step_{INTERVAL * 2:08d}"
    for path in sorted(newest.glob("*.distcp"))[:1] or sorted(newest.iterdir())[:1]:
        os.truncate(path, path.stat().st_size - 1)
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


def numeric(kind: str) -> Callable[[Lab, str], list[str]]:
    """A gradient that is not finite: gone when run again, or the data's, and then passed over."""

    def inject(lab: Lab, name: str) -> list[str]:
        run = lab.run(name, _drill(kind)).submit()
        run.wait_truth("finished", "given up")
        run.wait_gone()
        decided = run.folder / "decisions.jsonl"
        if kind == "nan":
            return lab.check(run) + (["E: samples were passed over"] if decided.exists() else [])
        decisions = decided.read_text().splitlines() if decided.exists() else []
        wrong = [] if len(decisions) == 1 else [f"E: {len(decisions)} decisions"]
        # Other samples were used from there on, on purpose: the curve is the same up to there.
        wrong += [w for w in lab.check(run) if not w.startswith(("B", "C"))]
        same = curve(run)[: INTERVAL + 8] == lab.reference(STEPS)[0][: INTERVAL + 8]
        return wrong + ([] if same else ["B: losses differ before the fault"])

    return inject


def flipped(lab: Lab, name: str) -> list[str]:
    """One rank's weight changes silently: found before the next save, and undone by going back."""
    run = lab.run(name, _drill("flip"), "watch.replica_interval_steps=5").submit()
    run.wait_truth("finished", "given up")
    run.wait_gone()
    wrong = lab.check(run)
    if not any("replica checksums differ" in e["headline"] for e in run.events()):
        wrong.append(f"E: {run.events()}")
    return wrong


def torchrun(lab: Lab, name: str) -> list[str]:
    """A rank is killed under torchrun: the agents end, and the policy starts another step."""
    run = lab.run(name, _drill("kill"), "cluster.launcher=torchrun").submit()
    run.wait_truth("finished", "given up")
    run.wait_gone()
    return lab.check(run)


ROWS = [
    Row("1", "rank killed", _in_place("kill", "process")),
    Row("1", "rank killed under torchrun", torchrun),
    Row("2", "exception on one rank", _in_place("exception", "crash")),
    Row("3", "segmentation fault", _in_place("segfault", "process")),
    Row("3", "abort", _in_place("abort", "process")),
    Row("5", "rank exits 0 early", _in_place("exit0", "crash")),
    Row("6", "watcher killed", watcher_killed),
    Row("7", "SIGTERM to one rank", terminated),
    Row("9", "rank stopped", _in_place("stop", "hang")),
    Row("10", "interpreter held", _in_place("hold", "hang")),
    Row("12", "rank asleep in the loop", _in_place("sleep", "hang")),
    Row("17", "power loss of rank 0's node", _lose_node("n1")),
    Row("18", "power loss of another node", _lose_node("n2")),
    Row("19", "node frozen, comes back", freeze),
    Row("20", "network cut, mended", cut, net=True),
    Row("21", "pause of two seconds", flap),
    Row("25", "too few nodes", drained),
    Row("27", "preempted at once", _preempted("low")),
    Row("27", "preempted with grace", _preempted("grace")),
    Row("28", "time limit", time_limit),
    Row("29", "cancelled by a person, resumed", cancelled),
    Row("29", "stopped by a person, resumed", stopped),
    Row("30", "controller away", controller_away),
    Row("31", "two copies", two_copies),
    Row("37", "newest checkpoint torn", torn_checkpoint),
    Row("44", "NaN once", numeric("nan")),
    Row("46", "NaN every time", numeric("nan_stays")),
    Row("48", "a weight's sign flipped on one rank", flipped),
    Row("52", "crash loop", crash_loop),
    Row("55", "wrong configuration", wrong_config),
]

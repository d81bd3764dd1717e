"""Faults of ranks, of what they read and of what they compute."""

import json
import os
import signal
from collections.abc import Callable

from tools.drills.lab import INTERVAL, STEPS, Lab, curve, passed_over

Inject = Callable[[Lab, str], list[str]]


def drill(kind: str, *, rank: int = 1, step: int = INTERVAL + 8, times: int = 1) -> str:
    return f"watch.drill=[{{kind:{kind},rank:{rank},step:{step},times:{times}}}]"


def in_place(kind: str, cause: str) -> Inject:
    """One rank ends or hangs: found, blamed, and all ranks go on without another attempt."""

    def inject(lab: Lab, name: str) -> list[str]:
        rank, step = (1 + lab.seed) % 2, INTERVAL + 8 + 5 * lab.seed
        run = lab.run(name, drill(kind, rank=rank, step=step)).submit()
        run.wait_truth("finished", "given up", "quiet")
        run.wait_gone()
        wrong = lab.check(run, causes=[cause])
        if len(run.attempts()) != 1:
            wrong.append(f"E: {len(run.attempts())} attempts where one should do")
        blamed = [(event["rank"], event["node"]) for event in run.events()]
        if kind != "exit0" and blamed != [(rank, f"n{rank + 1}")]:
            wrong.append(f"E: blamed {blamed}")
        return wrong

    return inject


def watcher_killed(lab: Lab, name: str) -> list[str]:
    """The parent of a rank is killed: no orphan goes on writing."""
    run = lab.run(name).submit()
    run.wait_step(INTERVAL + 2)
    os.kill(run.rank_pids("n2", 1)[0], signal.SIGKILL)
    return lab.end(run)


def terminated(lab: Lab, name: str) -> list[str]:
    """One rank is told to end: all save the same step, and another attempt goes on."""
    run = lab.run(name, drill("term")).submit()
    wrong = lab.end(run, causes=["stopped"])
    if run.attempts()[0]["step_after"] != INTERVAL + 8:
        wrong.append(f"E: saved step {run.attempts()[0]['step_after']}")
    return wrong


def crash_loop(lab: Lab, name: str) -> list[str]:
    """The same step fails for ever: three attempts, then the end, with its cause."""
    run = lab.run(name, drill("exception", times=0)).submit()
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


def numeric(kind: str) -> Inject:
    """A gradient or loss that is not sound: gone when run again, or the data's: passed over."""

    def inject(lab: Lab, name: str) -> list[str]:
        step = INTERVAL * 3 + 2 + 3 * lab.seed  # a median of losses means something by then
        rank, times = (1 + lab.seed) % 2, 0 if kind.endswith("_stays") else 1
        run = lab.run(name, drill(kind, step=step, rank=rank, times=times)).submit()
        run.wait_truth("finished", "given up")
        run.wait_gone()
        decided = run.folder / "decisions.jsonl"
        wrong = [] if "running the step again" in run.log() else ["E: nothing was noticed"]
        if not kind.endswith("_stays"):
            return wrong + lab.check(run) + (["E: samples passed over"] if decided.exists() else [])
        decisions = decided.read_text().splitlines() if decided.exists() else []
        wrong += [] if len(decisions) == 1 else [f"E: {len(decisions)} decisions"]
        if blamed := [node for record in run.attempts() for node in record["excluded"]]:
            wrong.append(f"E: {blamed} set aside for what the samples did")
        # Other samples were used from there on, on purpose: the curve is the same up to there, and
        # the ledger is the undisturbed run's and what was passed over.
        losses, state = lab.reference(STEPS)
        wrong += [w for w in lab.check(run) if not w.startswith(("B", "C"))]
        wrong += passed_over(run, state) if len(decisions) == 1 else []
        same = curve(run)[:step] == losses[:step]
        return wrong + ([] if same else ["B: losses differ before the fault"])

    return inject


def one_node(lab: Lab, name: str) -> list[str]:
    """NaN at one step for ever, on one node: sound on others, and that node is set aside."""
    rank, step = (1 + lab.seed) % 2, INTERVAL * 3 + 2 + 3 * lab.seed
    fault = drill("nan_on_node", step=step, rank=rank, times=0)
    run = lab.run(name, fault).submit()
    wrong = lab.end(run, causes=["suspect"])
    seen = [(r["failure"], r["action"], r["excluded"]) for r in run.attempts()]
    if seen != [("suspect", "requeue", [f"n{rank + 1}"]), ("finished", "done", [])]:
        wrong.append(f"E: {seen}")
    lines = (run.folder / "suspicions.jsonl").read_text().splitlines()
    verdicts = [json.loads(line)["verdict"] for line in lines]
    wrong += [] if verdicts == ["", "hardware"] else [f"E: verdicts {verdicts}"]
    return wrong + (["E: samples passed over"] if (run.folder / "decisions.jsonl").exists() else [])


def out_of_memory(lab: Lab, name: str) -> list[str]:
    """Host memory runs out at one step for ever: tried again once in place and once more."""
    run = lab.run(name, drill("memory", times=0)).submit()
    run.wait_truth("given up", "finished")
    run.wait_gone()
    seen = [(r["failure"], r["action"]) for r in run.attempts()]
    return [] if seen == [("oom_host", "again"), ("oom_host", "stop")] else [f"E: {seen}"]


def lingers(lab: Lab, name: str) -> list[str]:
    """A rank does not leave after the end: it is ended, and the run is finished all the same."""
    run = lab.run(name, drill("linger", step=STEPS)).submit()
    run.wait_truth("finished")
    run.wait_gone()
    wrong = [] if len(run.attempts()) == 1 else [f"E: {len(run.attempts())} attempts"]
    return wrong + lab.check(run)


def often_with_progress(lab: Lab, name: str) -> list[str]:
    """A rank is killed every two checkpoints: no budget ends a run that goes on in between."""
    steps = INTERVAL * 18
    kills = [f"{{kind:kill,rank:{k % 2},step:{INTERVAL * 2 * k + 3}}}" for k in range(1, 9)]
    run = lab.run(
        name, f"watch.drill=[{','.join(kills)}]", "slurm.restart.in_job=2", steps=steps
    ).submit()
    wrong = lab.end(run, steps=steps, causes=["process"])
    deaths = len(run.events()) + len(run.attempts()) - 1
    return wrong + ([] if deaths == len(kills) else [f"E: {deaths} ends for {len(kills)} kills"])


def alternating(lab: Lab, name: str) -> list[str]:
    """Two causes in turn at one step: the ceiling over all causes ends it."""
    faults = [f"{{kind:{('exception', 'kill')[k % 2]},rank:1,step:9}}" for k in range(9)]
    run = lab.run(name, f"watch.drill=[{','.join(faults)}]", "slurm.restart.ceiling=4").submit()
    run.wait_truth("given up", "finished")
    run.wait_gone()
    last, roots = run.attempts()[-1], {r["failure"] for r in run.attempts()}
    wrong = [] if roots == {"crash", "process"} else [f"E: {roots}"]
    if last["action"] != "stop" or "4 attempts ended without a new" not in last["reason"]:
        wrong.append(f"E: {len(run.attempts())} attempts, then {last['action']}: {last['reason']}")
    return wrong


def replica(kind: str) -> Inject:
    """One rank's weight changes silently: found before the next save, undone by going back."""

    def inject(lab: Lab, name: str) -> list[str]:
        run = lab.run(name, drill(kind), "watch.replica_interval_steps=5").submit()
        wrong = lab.end(run)
        if not any("replica checksums differ" in e["headline"] for e in run.events()):
            wrong.append(f"E: {run.events()}")
        return wrong

    return inject


def torchrun(lab: Lab, name: str) -> list[str]:
    """A rank is killed under torchrun: the agents end, and the policy starts another step."""
    run = lab.run(name, drill("kill"), "cluster.launcher=torchrun").submit()
    return lab.end(run)

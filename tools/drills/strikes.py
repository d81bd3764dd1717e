"""Faults at random, for the soak: each is struck at a run that takes steps, and undone later."""

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tools.drills.cluster import Run
from tools.drills.lab import Lab

Strike = Callable[[Lab, Run, str, int], None]


def _later(seconds: float, lab: Lab, verb: str, node: str) -> None:
    timer = threading.Timer(seconds, lab.cluster.do, (verb, node))
    timer.daemon = True
    timer.start()
    lab.timers.append(timer)


def _signal(number: int) -> Strike:
    def strike(_lab: Lab, run: Run, node: str, rank: int) -> None:
        os.kill(run.rank_pids(node, rank)[1], number)

    return strike


def _watcher(_lab: Lab, run: Run, node: str, rank: int) -> None:
    os.kill(run.rank_pids(node, rank)[0], signal.SIGKILL)


def _pause(lab: Lab, _run: Run, node: str, _rank: int) -> None:
    lab.cluster.do("freeze", node)
    time.sleep(2)
    lab.cluster.do("thaw", node)


def _power(lab: Lab, _run: Run, node: str, _rank: int) -> None:
    lab.cluster.do("crash", node)
    _later(25, lab, "boot", node)


def _freeze(lab: Lab, _run: Run, node: str, _rank: int) -> None:
    lab.cluster.do("freeze", node)
    _later(40, lab, "thaw", node)


def _controller(lab: Lab, run: Run, node: str, rank: int) -> None:
    lab.cluster.do("crash", "ctld")
    _later(10, lab, "boot", "ctld")
    os.kill(run.rank_pids(node, rank)[1], signal.SIGKILL)


def _preempt(lab: Lab, _run: Run, node: str, _rank: int) -> None:
    words = ("--parsable", "-p", "main", "-w", node, "--exclusive", "-o", "/dev/null")
    lab.cluster.slurm("sbatch", *words, "--wrap=sleep 5")


def _torn(_lab: Lab, run: Run, node: str, rank: int) -> None:
    newest = sorted((run.folder / "checkpoints").glob("step_*"))[-1]
    shard = sorted(newest.glob("*.distcp"))[0]
    os.truncate(shard, shard.stat().st_size - 1)
    os.kill(run.rank_pids(node, rank)[1], signal.SIGKILL)


@dataclass(frozen=True)
class Kind:
    """One kind of fault, and the classes under which the run may note it."""

    strike: Strike
    classes: tuple[str, ...]
    """Empty: nothing is to be noted, as nothing is to be restarted."""

    weight: int = 1


KINDS = {
    "rank killed": Kind(_signal(signal.SIGKILL), ("process",), 3),
    "rank aborts": Kind(_signal(signal.SIGABRT), ("process",)),
    "rank stopped": Kind(_signal(signal.SIGSTOP), ("hang",), 2),
    "rank told to end": Kind(_signal(signal.SIGTERM), ("stopped",)),
    "watcher killed": Kind(_watcher, ("node", "process"), 2),
    "node paused 2 s": Kind(_pause, ()),
    "node without power": Kind(_power, ("node",), 2),
    "node frozen 40 s": Kind(_freeze, ("node",)),
    "controller down 10 s": Kind(_controller, ("process",)),
    "preempted": Kind(_preempt, ("preempted", "stopped")),
    "newest checkpoint torn": Kind(_torn, ("process",)),
}


def choose(chance: random.Random) -> str:
    """A kind, by weight."""
    return chance.choices(list(KINDS), [kind.weight for kind in KINDS.values()])[0]


def strike(lab: Lab, run: Run, name: str, rank: int) -> bool:
    """Strike at ``rank`` and its node; False when the rank was not there to be struck."""
    try:
        nodes = run.attempts()[-1]["nodes"]
        KINDS[name].strike(lab, run, nodes[rank], rank)
    except (IndexError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"        {name} did not strike: {error!r}", flush=True)
        return False
    return True

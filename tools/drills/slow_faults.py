"""Ranks that are slow and do not fail."""

import json
import os
import signal
import threading
import time
from pathlib import Path

from tools.drills.lab import INTERVAL, Lab

TURN_SECONDS = 0.02  # stopped so long, then let go on so long
STEPS = 40 * INTERVAL
WITHIN = 50  # steps in which it is to be named


def stopped_by_turns(lab: Lab, name: str) -> list[str]:
    """A rank is stopped and continued by turns: named as slow, and nothing is restarted."""
    rank = (1 + lab.seed) % 2
    run = lab.run(name, steps=STEPS).submit()
    run.wait_step(INTERVAL + 2)
    turns = _Turns(run.rank_pids(f"n{rank + 1}", rank)[1])
    since = run.step()
    try:
        run.wait(lambda: run.step() >= since + WITHIN, seconds=400, what=f"{WITHIN} steps")
    finally:
        turns.end()
    wrong = lab.end(run, steps=STEPS)
    named = [(s["rank"], s["over"]) for s in _named(run.folder) if s["step"] <= since + WITHIN]
    if named[:1] != [(rank, False)]:
        wrong.append(f"E: struck at step {since}, named {_named(run.folder)}")
    if len(run.attempts()) != 1 or run.events():
        wrong.append("E: restarted for a rank that is slow")
    return wrong


class _Turns:
    """Stops and continues a process by turns until ``end``."""

    def __init__(self, pid: int) -> None:
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            for number in (signal.SIGSTOP, signal.SIGCONT):
                os.kill(self._pid, number)
                time.sleep(TURN_SECONDS)

    def end(self) -> None:
        """The process goes on."""
        self._over.set()
        self._thread.join()


def _named(run_dir: Path) -> list[dict[str, object]]:
    path = run_dir / "stragglers.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

"""How far a run has come, read from its folder: its checkpoints and its metrics, never its text."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.folder import is_complete

TAIL_BYTES = 1 << 16


def newest_step(run_dir: Path) -> int:
    """Steps in the newest whole checkpoint; 0 without one. Contents are not read."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return 0
    for path in sorted(folder.glob("step_*"), reverse=True):
        digits = path.name.removeprefix("step_")
        if digits.isdigit() and is_complete(path):
            return int(digits)
    return 0


def last_metrics(run_dir: Path) -> dict[str, Any]:
    """The newest whole line of metrics.jsonl that speaks of a training step; empty without one."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and "step" in values and "loss" in values:
            return values
    return {}


def took_steps(run_dir: Path, *, since: float, step_before: int) -> bool:
    """Whether training steps were taken after ``since``, from ``step_before`` on."""
    try:
        written = (run_dir / "metrics.jsonl").stat().st_mtime
    except FileNotFoundError:
        return False
    step = int(last_metrics(run_dir).get("step", 0))
    return newest_step(run_dir) > step_before or (written >= since and step > step_before)

"""How far a run has come, read from its folder: its checkpoints and its metrics, never its text."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.folder import is_complete

TAIL_BYTES = 1 << 16


def newest_step(run_dir: Path) -> int:
    """Steps in the newest whole checkpoint; 0 without one. Contents are not read."""
    path = _newest(run_dir)
    return int(_digits(path)) if path else 0


def booked(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What each source had given when the newest whole checkpoint was written; empty without one.

    Lines as megatron_ext/data/ledger.py writes them: tokens, documents, epochs, skipped_windows.
    """
    path = _newest(run_dir)
    try:
        state = json.loads((path / "state.json").read_text()) if path else {}
    except (OSError, ValueError):
        return {}  # deleted meanwhile by the run, or damaged, which is for loading to say
    consumed: dict[str, dict[str, Any]] = state.get("consumed", {})
    return consumed


def _newest(run_dir: Path) -> Path | None:
    found = [path for path in (run_dir / "checkpoints").glob("step_*") if _digits(path).isdigit()]
    return next((path for path in sorted(found, reverse=True) if is_complete(path)), None)


def _digits(path: Path) -> str:
    return path.name.removeprefix("step_")


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
        if isinstance(values, dict) and "loss" in values and _sound(values):
            return values
    return {}


def _sound(values: dict[str, Any]) -> bool:
    """Counts are counts and times are numbers, where they are given."""
    counts = (values.get(k, 0) for k in ("tokens", "global_batch_size", "seq_length"))
    times = (values.get(k, 0.0) for k in ("loss", "seconds", "step_seconds"))
    sound = all(isinstance(v, int) for v in (values.get("step"), *counts))
    return sound and all(isinstance(v, int | float) for v in times)


def took_steps(run_dir: Path, *, since: float, step_before: int) -> bool:
    """Whether training steps were taken after ``since``, from ``step_before`` on."""
    try:
        written = (run_dir / "metrics.jsonl").stat().st_mtime
    except FileNotFoundError:
        return False
    step = int(last_metrics(run_dir).get("step", 0))
    return newest_step(run_dir) > step_before or (written >= since and step > step_before)

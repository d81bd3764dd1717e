"""The lease: of two copies of one run, only the one that started last may write."""

import json
import os
import socket
import time
import uuid
from pathlib import Path

from megatron_ext.atomic import write_text


class LostLease(RuntimeError):
    """A newer copy of this run has started: this one must end without writing."""


def new_attempt() -> str:
    """A name for an attempt. It sorts by time, and no other attempt ever has it."""
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"


def _path(run_dir: Path) -> Path:
    return run_dir / "lease"


def holder(run_dir: Path) -> str:
    """The attempt that may write; empty when none ever started.

    Raises:
        ValueError: the lease is a link or is damaged.
    """
    try:
        handle = os.open(_path(run_dir), os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ValueError(f"{_path(run_dir)} is not a plain file: {error.strerror}") from error
    with open(handle, encoding="utf-8") as file:
        try:
            return str(json.loads(file.read(4096))["attempt"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{_path(run_dir)} is damaged: remove it to go on") from error


def take(run_dir: Path, attempt: str, *, after: str | None = None) -> str:
    """Make ``attempt`` the only one that may write; returns the one that could before.

    Names are only compared for equality, as the clocks of two nodes may disagree. ``after``:
    the attempt that this one continues; anyone else's start in between wins.

    Raises:
        LostLease: ``after`` is given and no longer holds the lease.
    """
    before = holder(run_dir)
    if after is not None and before != after:
        raise LostLease(f"{run_dir} belongs to attempt {before} now: {after} does not go on")
    note = {"attempt": attempt, "host": socket.gethostname(), "pid": os.getpid()}
    write_text(_path(run_dir), json.dumps(note) + "\n")
    return before


def check(run_dir: Path, attempt: str) -> None:
    """Call before every write that another copy must not see.

    Raises:
        LostLease: another attempt holds the lease.
    """
    now = holder(run_dir)
    if now != attempt:
        raise LostLease(
            f"{run_dir} belongs to attempt {now or '(none)'} now: attempt {attempt} stops without "
            f"writing"
        )

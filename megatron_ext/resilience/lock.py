"""One local run a folder: whoever starts first keeps the others out until it ends, however it ends.

Under Slurm the lease decides instead (lease.py): there the copy that started last is the one
that the scheduler means.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "lock"


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keep ``run_dir`` to this process and the forks it makes inside.

    Raises:
        ValueError: another process trains there; it is named. Or the lock is a link.
    """
    with _taken(run_dir) as handle:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield


def check_free(run_dir: Path) -> None:
    """Refuse a folder that a local run holds at this moment; nothing is written.

    Raises:
        ValueError: as ``held``.
    """
    if (run_dir / NAME).exists():
        with _taken(run_dir):
            pass


@contextmanager
def _taken(run_dir: Path) -> Iterator[int]:
    try:
        handle = os.open(run_dir / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ValueError(f"{run_dir / NAME} cannot be opened: {error.strerror}.") from error
    try:
        _lock(handle, run_dir)
        yield handle
    finally:
        os.close(handle)  # forks that still run hold it on


def _lock(handle: int, run_dir: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 256, 0).decode(errors="replace").strip()
        raise ValueError(
            f"run_dir={run_dir} is being trained by {holder or 'another process'}: wait for it, "
            f"end it with python -m launch.stop {run_dir}, or give this run another run_dir."
        ) from None

"""Where a rank stands, read from the stacks that faulthandler wrote for it."""

import re
from dataclasses import dataclass
from pathlib import PurePath

FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
COLLECTIVES = "distributed_c10d.py"
WAITING = "parallel/waiting.py"
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Place:
    """The innermost point of a rank's main thread."""

    call: str = ""
    """The collective that it waits in, such as ``all_reduce``; empty when it is in none."""

    frame: str = ""
    """Where that was called, or what it does instead: ``train/loop.py:84 fit``."""


UNKNOWN = Place(call="?")
"""No stacks yet: taken to wait for others, so that it is not blamed for its silence."""


def place(text: str) -> Place:
    """The place of the main thread in ``text``; ``UNKNOWN`` where there is none."""
    frames = _main_thread(text[:MAX_BYTES])
    if not frames:
        return UNKNOWN
    waits = [k for k, (path, _, _) in enumerate(frames) if path.endswith((COLLECTIVES, WAITING))]
    called = [frames[k][2] for k in waits if frames[k][0].endswith(COLLECTIVES)]
    call = (called[-1] if called else "wait") if waits else ""
    beyond = frames[waits[-1] + 1 :] if waits else frames
    ours = next(
        (f for f in beyond if "/lib/python3" not in f[0] or "/megatron/" in f[0]), beyond[0]
    )
    path = PurePath(ours[0])
    return Place(call=call, frame=f"{path.parent.name}/{path.name}:{ours[1]} {ours[2]}")


def _main_thread(text: str) -> list[tuple[str, int, str]]:
    """Path, line and function of its frames, innermost first.

    The signal reaches the main thread; should it not, that is the one below which the fork began.
    """
    current: list[tuple[str, int, str]] = []
    threads = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.M)
    headers = re.findall(r"^(Current thread|Thread) ", text, flags=re.M)
    for header, body in zip(headers, threads[1:]):
        found = [FRAME.match(line) for line in body.splitlines()]
        frames = [(f[1], int(f[2]), f[3]) for f in found if f]
        if any(path.endswith("resilience/child.py") for path, _, _ in frames):
            return frames
        if header.startswith("Current"):
            current = frames
    return current

"""Starting several ranks on this machine, and ending them together."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

GRACE_SECONDS = 30
"""How long ranks may take to leave by themselves after one of them has failed."""


def start_ranks(count: int, main: Callable[[], int]) -> int:
    """Fork ``count`` ranks that each run ``main``; return the first non-zero exit code.

    Forked, so that Megatron is imported once for all of them. Only for ranks on CPUs: a parent
    that has touched CUDA cannot fork.
    """
    children = [_fork(rank, count, main) for rank in range(count)]

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for child in children:
            _kill(child, number)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        return _wait(set(children))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fork(rank: int, count: int, main: Callable[[], int]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count)
    )
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever started us may have ignored it
    code = 1
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(left: set[int]) -> int:
    worst, deadline = 0, float("inf")
    while left:
        try:
            child, status = os.waitpid(-1, 0 if deadline == float("inf") else os.WNOHANG)
        except InterruptedError:
            continue
        except ChildProcessError:
            break
        if child in left:
            left.discard(child)
            code = os.waitstatus_to_exitcode(status)
            if code and not worst:
                worst = code if code > 0 else 128 - code
                deadline = time.monotonic() + GRACE_SECONDS
                for other in left:
                    _kill(other, signal.SIGTERM)
        elif time.monotonic() > deadline:
            for other in left:
                _kill(other, signal.SIGKILL)
        else:
            time.sleep(0.05)
    return worst


def _kill(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)

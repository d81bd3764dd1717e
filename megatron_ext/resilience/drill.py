"""Faults on purpose: what a drill does to one rank, once, to see the run come through."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_ext.legal import unknown_choice

SLOW_SECONDS = 0.05


@dataclass(kw_only=True)
class DrillConfig:
    """One planned fault. ``watch.drill`` lists them; a real run has none."""

    kind: str
    """A word of ``FAULTS``, ``NUMERIC``, ``MOMENTS`` or ``LASTING``."""

    step: int
    """Struck before this step (counted from 0)."""

    rank: int = 0
    times: int = 1
    """Attempts and restarts that it strikes; 0 is every time."""

    def check(self) -> None:
        """Refuse an unknown fault, and counts below 0.

        Raises:
            ValueError: naming the known ones, or the key.
        """
        known = [*FAULTS, *NUMERIC, *MOMENTS, *LASTING]
        if self.kind not in known:
            raise unknown_choice("watch.drill.kind", self.kind, known)
        for key in ("step", "rank", "times"):
            if (value := getattr(self, key)) < 0:
                raise ValueError(f"watch.drill.{key}={value} of {self.kind} must be at least 0.")


def _raise() -> None:
    raise RuntimeError("drill: exception")


def _hold_interpreter() -> None:
    while True:
        ctypes.PyDLL(None).sleep(1000)


def _read_nothing() -> None:
    ctypes.string_at(0)


def _kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _ask_for_too_much() -> None:
    bytearray(1 << 60)


def _sleep() -> None:
    time.sleep(100_000)


def spin() -> None:
    """Compute for ``SLOW_SECONDS`` of CPU time."""
    end = time.thread_time() + SLOW_SECONDS
    while time.thread_time() < end:
        pass


FAULTS: dict[str, Callable[[], None]] = {
    "exception": _raise,
    "segfault": _read_nothing,
    "abort": os.abort,
    "memory": _ask_for_too_much,
    "exit0": lambda: os._exit(0),
    "kill": _kill(signal.SIGKILL),
    "term": _kill(signal.SIGTERM),
    "interrupt": _kill(signal.SIGINT),
    "stop": _kill(signal.SIGSTOP),
    "hold": _hold_interpreter,
    "sleep": _sleep,
}
# Struck inside the step instead, by the callback that has the model (train/callbacks/drill.py).
# ``nan``, ``spike`` (of the loss) and ``steep`` (of a gradient alone) are gone when the step is run
# again, ``.._stays`` are not, ``nan_on_node`` stays on the node that was struck first and strikes
# nobody on others. ``flip`` changes the sign of one weight, ``ulp`` its last bit.
NUMERIC = (
    *("nan", "nan_stays", "nan_on_node", "spike", "spike_stays", "steep", "steep_stays"),
    *("flip", "ulp"),
)
# ``kill_in_save`` ends the rank when the first byte of a save is there, ``linger`` never leaves.
MOMENTS = ("kill_in_save", "linger")
# Before every step from ``step`` on, until the process ends. ``slow`` computes, ``late`` sleeps.
LASTING: dict[str, Callable[[], None]] = {"slow": spin, "late": lambda: time.sleep(SLOW_SECONDS)}

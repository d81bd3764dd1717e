"""A rank's own time in a step: what is left when waiting for others is taken out.

In a synchronous job all ranks' steps take equally long; the slow one is the one that never waits.
"""

import os
import time
from pathlib import Path
from typing import Any

import torch

from megatron_ext.devices.device import current
from megatron_ext.parallel.waiting import waits

SCHEDSTAT = Path("/proc/thread-self/schedstat")
"""CPU time, time spent runnable without a core, slices; nanoseconds (kernel: sched-stats.rst)."""


class OwnTime:
    """Measures one step at a time: ``start``, then ``stop``."""

    def start(self) -> None:
        """The step begins."""

    def stop(self) -> float:
        """Seconds of own work in the step."""
        raise NotImplementedError


class CpuTime(OwnTime):
    """Wall time less the waits in collectives and for a core; at least the CPU time.

    A foreign load on the machine shows in none of the terms; a rank that computes longer, sleeps,
    is stopped or waits for a disk shows in full.
    """

    def __init__(self) -> None:
        self._waits = waits()
        self._stat = os.open(SCHEDSTAT, os.O_RDONLY) if SCHEDSTAT.exists() else -1

    def _now(self) -> tuple[float, float]:
        """Wall time that was not spent waiting, and CPU time."""
        cpu = time.thread_time()
        if self._stat < 0:
            return cpu, cpu
        no_core = int(os.pread(self._stat, 100, 0).split()[1]) * 1e-9
        return time.perf_counter() - self._waits.seconds - no_core, cpu

    def start(self) -> None:
        """Read the clocks."""
        self._began = self._now()

    def stop(self) -> float:
        """Seconds of own work since ``start``."""
        free, cpu = self._now()
        return max(free - self._began[0], cpu - self._began[1])


class GpuTime(OwnTime):
    """Time of the forward passes on the GPU, by events around each model chunk.

    A stage's forward waits for nobody but its tensor-parallel peers: a slow one of these shows as
    a slow group. Events are read a step later, so that nothing is waited for.
    """

    def __init__(self, chunks: list[Any]) -> None:
        self._open: list[torch.cuda.Event] = []
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._before: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for chunk in chunks:
            chunk.register_forward_pre_hook(lambda *_: self._open.append(self._mark()))
            chunk.register_forward_hook(lambda *_: self._close())

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _close(self) -> None:
        self._pairs.append((self._open.pop(), self._mark()))

    def start(self) -> None:
        """Forget what evaluation ran in between."""
        self._pairs = []

    def stop(self) -> float:
        """Seconds of the step before, which is over on the GPU too; 0 for the first."""
        done, self._before = self._before, self._pairs
        return sum(a.elapsed_time(b) for a, b in done if b.query()) / 1000


def own_time(chunks: list[Any]) -> OwnTime:
    """The measure for the device in use."""
    return GpuTime(chunks) if current().name == "cuda" else CpuTime()

"""Two sides of a comparison in one run, in turn, so that a drifting machine hits both alike."""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """What one call cost."""

    wall: float
    cpu: float
    """CPU seconds of this process and of children that have ended."""


@dataclass(frozen=True)
class Pairs:
    """Interleaved samples of two sides: ``ours`` and what it is held against."""

    ours: list[Sample]
    peer: list[Sample]

    def ratio(self, field: str = "cpu") -> float:
        """Median over the pairs of ours / peer."""
        pairs = zip(self.ours, self.peer, strict=True)
        return statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs)

    def median(self, side: str, field: str = "cpu") -> float:
        """Median of one side, in seconds."""
        return statistics.median(getattr(s, field) for s in getattr(self, side))


def cpu_seconds() -> float:
    """User and system time of this process and of children that have ended."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def measure(call: Callable[[], object]) -> Sample:
    """One call, timed."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    call()
    return Sample(wall=time.perf_counter() - wall, cpu=cpu_seconds() - cpu)


def interleave(
    ours: Callable[[], object], peer: Callable[[], object], *, pairs: int = 7, warmup: int = 1
) -> Pairs:
    """``pairs`` samples of each side, A B A B, after ``warmup`` uncounted ones."""
    for _ in range(warmup):
        ours()
        peer()
    samples = [(measure(ours), measure(peer)) for _ in range(pairs)]
    return Pairs(ours=[a for a, _ in samples], peer=[b for _, b in samples])


def report(what: str, pairs: Pairs, *, ours: str, peer: str, bar: str) -> None:
    """Print both sides and their ratio, with the machine's load beside it."""
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{what}  [{platform.processor() or platform.machine()}, load {load}]")
    for side, name in (("ours", ours), ("peer", peer)):
        cpu, wall = pairs.median(side), pairs.median(side, "wall")
        print(f"  {name:<44} {cpu:9.4f} CPU-s {wall:9.4f} s wall  (median of {len(pairs.ours)})")
    print(f"  ratio {pairs.ratio():.3f} CPU, {pairs.ratio('wall'):.3f} wall; bar: {bar}")

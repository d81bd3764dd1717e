"""A rank's sign of life: one shared page that it writes and a process outside of it reads."""

import mmap
import struct
import time
from collections import deque
from dataclasses import dataclass

SECTIONS = ("start", "step", "between", "save", "finish")
# Count of beats, monotonic time of the last, steps done, section, regime, steps of this regime and
# their 99th percentile, longest stay in each section. Written in place: a torn read is read again
# a tick later.
PAGE = struct.Struct(f"<Qdqqqqd{len(SECTIONS)}d")
CALLS_AT = 1024  # of the page: collectives that the rank has begun to wait for
MEMORY = 256  # steps that the percentile is taken over
# Clock of the whole machine, so that two processes compare; never set back by ntp or a person.
now = time.monotonic


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What the page says."""

    count: int
    at: float
    step: int
    section: str
    regime: int
    """Names steps of equal work: a longer sequence or a larger batch is another regime."""

    regime_steps: int
    p99_seconds: float
    """Of the last steps of this regime."""

    longest: tuple[float, ...]
    """Stay in each section so far."""

    calls: int
    """Collectives that the rank has begun to wait for."""


class Heartbeat:
    """The page. Made by the parent; a forked child that writes it is read by the parent."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)  # anonymous and shared: no file to leave behind
        self.calls = memoryview(self._page)[CALLS_AT : CALLS_AT + 8].cast("Q")
        """The count of ``Beat.calls``, written by parallel/waiting.py."""
        self.clear()

    def clear(self) -> None:
        """Forget a rank that has ended, before the next one is started on the same page."""
        self._count = self._step = self._regime = self._section = 0
        self._at, self._p99 = now(), 0.0
        self._steps: deque[float] = deque(maxlen=MEMORY)
        self._longest = [0.0] * len(SECTIONS)
        self.calls[0] = 0
        self._write()

    def _write(self) -> None:
        PAGE.pack_into(
            self._page,
            0,
            self._count,
            self._at,
            self._step,
            self._section,
            self._regime,
            len(self._steps),
            self._p99,
            *self._longest,
        )

    def enter(self, section: str) -> float:
        """The rank begins ``section``; returns how long it was in the one before."""
        at = now()
        stay, self._at = at - self._at, at
        self._longest[self._section] = max(self._longest[self._section], stay)
        self._count += 1
        self._section = SECTIONS.index(section)
        self._write()
        return stay

    def step_done(self, step: int, *, regime: int) -> None:
        """``step`` steps are done, of the work of ``regime`` each."""
        if regime != self._regime:
            self._steps.clear()
        self._step, self._regime = step, regime
        self._steps.append(self.enter("between"))
        self._p99 = sorted(self._steps)[max(0, -(-99 * len(self._steps) // 100) - 1)]
        self._write()

    def read(self) -> Beat:
        """What the page says now."""
        count, at, step, section, regime, steps, p99, *longest = PAGE.unpack_from(self._page, 0)
        return Beat(
            count=count,
            at=at,
            step=step,
            section=SECTIONS[section] if section < len(SECTIONS) else "start",
            regime=regime,
            regime_steps=steps,
            p99_seconds=p99,
            longest=tuple(longest),
            calls=self.calls[0],
        )

"""A rank's sign of life: one shared page that it writes and a process outside of it reads."""

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

SECTIONS = ("start", "step", "between", "save", "finish")
# Count of beats, monotonic time of the last, steps done, section, regime, seconds of the last
# step, longest stay in each section. Written in place: a torn read is read again a tick later.
PAGE = struct.Struct(f"<Qdqqqd{len(SECTIONS)}d")
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

    step_seconds: float
    longest: tuple[float, ...]


class Heartbeat:
    """Writes the page; without a path it writes to nothing that anyone reads."""

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            self._page = mmap.mmap(-1, PAGE.size)
        else:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            os.ftruncate(handle, mmap.PAGESIZE)
            self._page = mmap.mmap(handle, mmap.PAGESIZE)
            os.close(handle)
        self.clear()

    def clear(self) -> None:
        """Forget a rank that has ended, before the next one is started on the same page."""
        self._count = self._step = self._regime = self._section = 0
        self._at, self._step_seconds = now(), 0.0
        self._longest = [0.0] * len(SECTIONS)
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
            self._step_seconds,
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
        self._step, self._regime = step, regime
        self._step_seconds = self.enter("between")
        self._write()

    def read(self) -> Beat:
        """What the page says now."""
        count, at, step, section, regime, seconds, *longest = PAGE.unpack_from(self._page, 0)
        return Beat(
            count=count,
            at=at,
            step=step,
            section=SECTIONS[section] if section < len(SECTIONS) else "start",
            regime=regime,
            step_seconds=seconds,
            longest=tuple(longest),
        )

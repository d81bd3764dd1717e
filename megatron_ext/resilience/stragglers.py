"""Which ranks are slower than their peers, for long enough to say so. Pure."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from megatron_ext import jsonl

WINDOWS = 3  # in a row, before a rank is named, and before it counts as well again
MIN_SECONDS = 0.002  # a step; below it, a ratio is noise of the clock


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """One rank that works longer than its peers, or does so no more."""

    rank: int
    node: str
    ratio: float
    """Its own time over the median of its peers'."""

    seconds: float
    """Own time a step."""

    step: int = 0
    attempt: str = ""
    over: bool = False
    """It is as fast as the others again."""

    kind: str = "work"
    """``work``; or ``network``, where ``seconds`` is the way from rank 0's node and back."""

    def line(self) -> str:
        """For a person."""
        if self.kind == "network":
            if self.over:
                return f"node {self.node} answers as fast as the others again (step {self.step})"
            return (
                f"node {self.node} is slow to reach: {1000 * self.seconds:.0f} ms there and back "
                f"at best (step {self.step})"
            )
        if self.over:
            return f"rank {self.rank} on {self.node} is no longer slow (step {self.step})"
        return (
            f"rank {self.rank} on {self.node} is slow: {1000 * self.seconds:.0f} ms of own work a "
            f"step, {self.ratio:.1f} x the median of its peers (step {self.step})"
        )


class Judge:
    """Compares every rank with the others of its pipeline stage, which do the same work."""

    def __init__(self, *, factor: float, stages: list[int]) -> None:
        self._factor, self._stages = factor, stages
        self._in_a_row = [0] * len(stages)  # windows: slow above 0, well below
        self._named: set[int] = set()

    def ratios(self, seconds: list[float]) -> list[float]:
        """Each rank's time over the median of its peers'; 1 where it has none."""
        found = []
        for rank, (stage, mine) in enumerate(zip(self._stages, seconds, strict=True)):
            peers = [
                other
                for k, other in enumerate(seconds)
                if k != rank and self._stages[k] == stage and other > 0
            ]
            usual = statistics.median(peers) if peers else mine
            found.append(mine / usual if usual > 0 and mine - usual > MIN_SECONDS else 1.0)
        return found

    def observe(self, seconds: list[float]) -> tuple[list[int], list[int]]:
        """One window's own time of every rank; returns the ranks that turned slow, and well."""
        turned, recovered = [], []
        for rank, ratio in enumerate(self.ratios(seconds)):
            slow, past = ratio > self._factor, self._in_a_row[rank]
            self._in_a_row[rank] = max(past, 0) + 1 if slow else min(past, 0) - 1
            if self._in_a_row[rank] >= WINDOWS and rank not in self._named:
                self._named.add(rank)
                turned.append(rank)
            elif self._in_a_row[rank] <= -WINDOWS and rank in self._named:
                self._named.discard(rank)
                recovered.append(rank)
        return turned, recovered


def _path(run_dir: Path) -> Path:
    return run_dir / "stragglers.jsonl"


def record(run_dir: Path, found: Straggler) -> None:
    """Append it to RUN_DIR/stragglers.jsonl."""
    jsonl.append(_path(run_dir), found)


def forget(run_dir: Path) -> None:
    """Remove what earlier starts of the run have named."""
    _path(run_dir).unlink(missing_ok=True)


def known(run_dir: Path, *, attempt: str) -> list[Straggler]:
    """Ranks that were named in ``attempt`` and have not recovered since."""
    newest: dict[tuple[str, str | int], Straggler] = {}
    for found in jsonl.read(_path(run_dir), Straggler):
        if found.attempt == attempt:
            newest[found.kind, found.node if found.kind == "network" else found.rank] = found
    return [found for found in newest.values() if not found.over]

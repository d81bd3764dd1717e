"""The way from rank 0's watcher to the others' and back: which node answers late. Pure.

Every watcher sends the newest ping's time back. The shortest way of a window is kept, so that a
busy machine, which delays some answers, does not look like a slow network, which delays all.
"""

import statistics

WINDOW_SECONDS = 5.0
WINDOWS = 2  # in a row, before a node is named
FLOOR_SECONDS = 0.010
FACTOR = 5.0


class Links:
    """Judges the nodes of one job, as seen from ``here``."""

    def __init__(self, here: str) -> None:
        self._here, self._began = here, -1.0
        self._shortest: dict[str, float] = {}
        self._late: dict[str, int] = {}
        self.named: dict[str, float] = {}
        """Nodes that are slow now, with their round trip in seconds."""

    def hear(self, node: str, seconds: float) -> None:
        """A round trip to a rank of ``node``."""
        if node != self._here:
            self._shortest[node] = min(seconds, self._shortest.get(node, seconds))

    def tick(self, now: float) -> tuple[dict[str, tuple[float, float]], list[str]]:
        """Nodes that turned slow, each with its time and the usual one; and those well again."""
        if self._began < 0:
            self._began = now
        if now - self._began < WINDOW_SECONDS:
            return {}, []
        self._began, seen, self._shortest = now, self._shortest, {}
        slow = {node: self._usual(node, seen) for node in seen}
        slow = {
            n: usual for n, usual in slow.items() if seen[n] > max(FLOOR_SECONDS, FACTOR * usual)
        }
        if len(seen) > 1 and len(slow) == len(seen):
            # All are far from here, so it is this node that is.
            seen[self._here], slow = min(seen.values()), {self._here: 0.0}
        self._late = {node: self._late.get(node, 0) + 1 for node in slow}
        turned = {
            node: (seen[node], slow[node])
            for node, times in self._late.items()
            if times >= WINDOWS and node not in self.named
        }
        well = [node for node in self.named if node not in slow]
        self.named = {n: t for n, t in self.named.items() if n in slow}
        self.named |= {node: seconds for node, (seconds, _) in turned.items()}
        return turned, well

    @staticmethod
    def _usual(node: str, seen: dict[str, float]) -> float:
        """Median of the others, of which a slow network may hold less than half; 0 alone."""
        others = [seconds for other, seconds in seen.items() if other != node]
        near = [seconds for seconds in others if seconds <= FLOOR_SECONDS]
        return statistics.median(near) if near else 0.0

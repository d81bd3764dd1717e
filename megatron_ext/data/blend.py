"""Which source gives sample k of a phase, for constant and for ramping shares.

The rule is megatron-core's build_blending_indices: sample k goes to the source that lags furthest
behind its share of k samples, ties to the first, in the same float64 arithmetic; for constant
shares the sequence is the same bit for bit. It is built in blocks as they are asked for, so that a
phase of a billion samples starts at once.
"""

import numpy as np

from megatron_ext.data.blend_compiled import fill_order

BLOCK = 2**16
"""Samples built at a time: 0.4 MB for each block held, and a row of counts kept for all."""


class Blend:
    """The order of sources in a phase of ``samples`` samples."""

    def __init__(
        self,
        shares: np.ndarray,
        *,
        shares_end: np.ndarray | None = None,
        samples: float = 0.0,
        ramp_power: float = 1.0,
    ) -> None:
        """Shares, which sum to 1, at the start of the phase and, if they ramp, at its end.

        The share at fraction x of the phase is start + (end - start) * x ** ramp_power; past the
        end it stays where the ramp left it.
        """
        self.shares = np.asarray(shares, dtype=np.float64)
        ramps = shares_end is not None and not np.array_equal(shares, shares_end)
        self.shares_end = np.asarray(shares_end, dtype=np.float64) if ramps else None
        self.samples, self.ramp_power = float(samples), ramp_power
        self._counts = [np.zeros(len(self.shares), dtype=np.int64)]
        self._blocks: dict[int, np.ndarray] = {}
        self._within: dict[int, np.ndarray] = {}

    def due(self, samples: np.ndarray | float) -> np.ndarray:
        """Samples each source ought to have given of the first ``samples``: [..., sources]."""
        x = np.asarray(samples, dtype=np.float64)[..., None]
        if self.shares_end is None:
            return self.shares * x
        inside = np.minimum(x, self.samples)
        power = self.ramp_power + 1.0
        grown = self.samples * (inside / self.samples) ** power / power + (x - inside)
        return self.shares * x + (self.shares_end - self.shares) * grown

    def block(self, number: int) -> np.ndarray:
        """Sources of samples ``number * BLOCK`` and on, int16."""
        found = self._blocks.get(number)
        if found is None:
            while len(self._counts) <= number:
                self._build(len(self._counts) - 1)
            found = self._build(number)
            while len(self._blocks) >= 4:
                furthest = max(self._blocks, key=lambda held: abs(held - number))
                del self._blocks[furthest], self._within[furthest]
            self._blocks[number], self._within[number] = found, earlier(found)
        return found

    def _build(self, number: int) -> np.ndarray:
        order, counts = self._fill(number * BLOCK, BLOCK, self._counts[number].copy())
        if len(self._counts) == number + 1:
            self._counts.append(counts)
        return order

    def _fill(self, first: int, size: int, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(counts) == 1:
            return np.zeros(size, dtype=np.int16), counts + size
        order = np.empty(size, dtype=np.int16)
        if self.shares_end is None:
            if len(counts) == 2 and two_sources(self.shares, first, order):
                return order, counts + np.bincount(order, minlength=2)
            if fill_order(self.shares, counts, first, order):
                return order, counts
        # Megatron's clamp: sample 0 is judged as if it were sample 1.
        positions = np.maximum(np.arange(first, first + size), 1)
        behind, floats = np.empty(len(counts)), counts.astype(np.float64)
        for low in range(0, size, 1024):
            due = self.due(positions[low : low + 1024])
            for k, row in enumerate(due, start=low):
                chosen = int(np.subtract(row, floats, out=behind).argmax())
                order[k] = chosen
                floats[chosen] += 1.0
        return order, floats.astype(np.int64)

    def counts_before(self, k: int) -> np.ndarray:
        """Samples each source gave of the first ``k``, int64."""
        number, inside = divmod(k, BLOCK)
        if not inside:
            self.block(max(number - 1, 0))
            return self._counts[number]
        added = np.bincount(self.block(number)[:inside], minlength=len(self.shares))
        return self._counts[number] + added

    def at(self, k: int) -> tuple[int, int]:
        """Source of sample ``k``, and how many samples that source gave before it."""
        number, inside = divmod(k, BLOCK)
        order = self.block(number)
        source = order.item(inside)
        return source, self._counts[number].item(source) + self._within[number].item(inside)


def two_sources(shares: np.ndarray, first: int, order: np.ndarray) -> bool:
    """Fill ``order`` from a closed form and check every sample of it against the rule.

    Source 1 lags more at sample k exactly where it gave fewer than shares[1] * k samples, so that
    it gave ceil(shares[1] * (k - 1)) before it.

    Returns:
        Whether all agree: the form is exact arithmetic, and the rule is float64's.
    """
    k = np.arange(first, first + len(order) + 1)
    given = np.ceil(shares[1] * (k - 1.0))
    if first < 2:
        given[: 2 - first] = [0.0, float(shares[1] > shares[0])][first:]
    x = np.maximum(k[:-1], 1)
    now = given[:-1]
    chosen = shares[1] * x - now > shares[0] * x - (k[:-1] - now)
    order[:] = chosen
    return bool(np.array_equal(chosen, given[1:] - now))


def earlier(order: np.ndarray) -> np.ndarray:
    """For each sample of a block, how many before it in the block are of its source."""
    by_source = np.argsort(order, kind="stable")  # 16-bit keys: by counting
    counts = np.bincount(order)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    within = np.empty(len(order), dtype=np.int32)
    within[by_source] = np.arange(len(order)) - starts
    return within

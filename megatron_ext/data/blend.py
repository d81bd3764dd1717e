"""Which source gives sample k of a phase, for constant and for ramping shares.

The rule is megatron-core's build_blending_indices: sample k goes to the source that lags furthest
behind its share of k samples, ties to the first, in the same float64 arithmetic; for constant
shares the sequence is the same bit for bit. It is built in blocks as they are asked for, so that a
phase of a billion samples starts at once.
"""

import numpy as np

from megatron_ext.data.blend_order import fill_order

BLOCK = 2**16
"""Samples built at a time: 0.6 MB for each block held, and a row of counts kept for all."""


class Blend:
    """The order of sources in a phase of ``samples`` samples."""

    def __init__(
        self,
        shares: np.ndarray,
        *,
        shares_end: np.ndarray | None = None,
        samples: float = 0.0,
        ramp_power: float = 1.0,
        begun: float = 0.0,
    ) -> None:
        """Shares, which sum to 1, at the start of the phase and, if they ramp, at its end.

        The share at fraction x of the phase is start + (end - start) * x ** ramp_power; past the
        end it stays where the ramp left it. Sample 0 is the one after the first ``begun`` samples
        of the phase, whose sources are not counted here.
        """
        self.shares = np.asarray(shares, dtype=np.float64)
        ramps = shares_end is not None and not np.array_equal(shares, shares_end)
        self.shares_end = np.asarray(shares_end, dtype=np.float64) if ramps else None
        self.samples, self.ramp_power = float(samples), ramp_power
        self.begun = float(begun) if ramps else 0.0
        self._counts = [np.zeros(len(self.shares), dtype=np.int64)]
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def due(self, samples: np.ndarray | float) -> np.ndarray:
        """Samples each source ought to have given of the first ``samples``: [..., sources]."""
        x = np.asarray(samples, dtype=np.float64)[..., None]
        if self.shares_end is None:
            return self.shares * x
        return self._since_the_start(self.begun + x) - self._since_the_start(self.begun)

    def _since_the_start(self, x: np.ndarray | float) -> np.ndarray:
        """The ramp's integral over the first ``x`` samples of the phase: [..., sources]."""
        assert self.shares_end is not None
        inside = np.minimum(x, self.samples)
        power = self.ramp_power + 1.0
        grown = self.samples * (inside / self.samples) ** power / power + (x - inside)
        return np.asarray(self.shares * x + (self.shares_end - self.shares) * grown)

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of samples ``number * BLOCK`` and on: source, and how many it gave before; int16, int64.

        The two arrays are build_blending_indices' own.
        """
        found = self._blocks.get(number)
        if found is None:
            for earlier in range(len(self._counts) - 1, number):
                self._build(earlier)
            found = self._build(number)
            while len(self._blocks) >= 4:
                del self._blocks[max(self._blocks, key=lambda held: abs(held - number))]
            self._blocks[number] = found
        return found

    def _build(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        order, before = np.empty(BLOCK, dtype=np.int16), np.empty(BLOCK, dtype=np.int64)
        counts = self._counts[number].copy()
        self._fill(number * BLOCK, counts, order, before)
        if len(self._counts) == number + 1:
            self._counts.append(counts)
        return order, before

    def _fill(self, first: int, counts: np.ndarray, order: np.ndarray, before: np.ndarray) -> None:
        """Fill both arrays from sample ``first`` on; ``counts`` moves along."""
        if self.shares_end is None:
            if len(counts) == 1:
                order[:], before[:] = 0, np.arange(first, first + len(order))
                counts += len(order)
                return
            fill_order(self.shares, counts, first, order, before)
            return
        # Megatron's clamp: sample 0 is judged as if it were sample 1.
        positions = np.maximum(np.arange(first, first + len(order)), 1)
        behind, given = np.empty(len(counts)), counts.astype(np.float64)
        for low in range(0, len(order), 1024):
            due = self.due(positions[low : low + 1024])
            for k, row in enumerate(due, start=low):
                chosen = int(np.subtract(row, given, out=behind).argmax())
                order[k], before[k] = chosen, given[chosen]
                given[chosen] += 1.0
        counts[:] = given

    def counts_before(self, k: int) -> np.ndarray:
        """Samples each source gave of the first ``k``, int64."""
        number, inside = divmod(k, BLOCK)
        if not inside:
            self.block(max(number - 1, 0))
            return self._counts[number]
        added = np.bincount(self.block(number)[0][:inside], minlength=len(self.shares))
        return self._counts[number] + added

    def at(self, k: int) -> tuple[int, int]:
        """Source of sample ``k``, and how many samples that source gave before it."""
        number, inside = divmod(k, BLOCK)
        order, before = self.block(number)
        return order.item(inside), before.item(inside)

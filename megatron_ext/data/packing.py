"""Best-fit-decreasing packing of whole sequences into windows, for instruction data.

Sequences of one length are placed together, and bins that were treated alike are one run of bin
numbers: the work is then per pair of (length, remaining space) that really meet, not per sequence.
The bins are those of placing one sequence at a time.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Which bin each sequence went to."""

    bins: np.ndarray
    """int32, a bin number per sequence; -1 for empty ones."""

    num_bins: int

    def members(self) -> tuple[np.ndarray, np.ndarray]:
        """Sequences bin by bin, and where each bin's begin: [num_bins + 1]."""
        kept = np.flatnonzero(self.bins >= 0)
        order = kept[np.argsort(self.bins[kept], kind="stable")]
        counts = np.bincount(self.bins[kept], minlength=self.num_bins)
        return order, np.concatenate([[0], np.cumsum(counts)])


def best_fit(lengths: np.ndarray, *, capacity: int) -> Packing:
    """Put each sequence, longest first, into the fullest bin that still has room for it.

    Raises:
        ValueError: a sequence is longer than a bin.
    """
    longest = int(lengths.max(initial=0))
    if longest > capacity:
        over = int(np.count_nonzero(lengths > capacity))
        raise ValueError(
            f"seq_length={capacity} cannot hold {over} of {len(lengths)} sequences, the longest "
            f"of {longest} tokens: cut or leave them out, or use seq_length={longest}."
        )
    counts = np.bincount(lengths, minlength=1)
    placements, num_bins = _place(counts, capacity)
    bins = np.empty(len(lengths), dtype=np.int32)
    # 16-bit keys are sorted by counting: linear, and stable.
    narrow = lengths.astype(np.uint16 if longest < 2**16 else np.int64)
    ascending = np.argsort(narrow, kind="stable")
    bins[ascending[int(counts[0]) :]] = _expanded(placements)[::-1]
    bins[ascending[: int(counts[0])]] = -1
    return Packing(bins=bins, num_bins=num_bins)


def _place(counts: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Rows of (first bin, bins, sequences in each), in the order of sequences, longest first."""
    rows: list[tuple[int, int, int]] = []
    runs: list[list[tuple[int, int]]] = [[] for _ in range(capacity + 1)]
    spaces: list[int] = []  # remaining spaces of which there are bins, ascending
    num_bins = 0
    present = np.flatnonzero(counts)
    for length, count in zip(present[::-1].tolist(), counts[present][::-1].tolist(), strict=True):
        if not length:
            break
        at = bisect_left(spaces, length)
        left: list[int] = []
        while count:
            if at < len(spaces):
                space = spaces[at]
                run = runs[space]
                first, size = run.pop()
            else:
                space, run = capacity, runs[capacity]
                first, size = num_bins, -(-count // (capacity // length))
                num_bins += size
            each = space // length
            full = min(size, count // each)
            if full:
                rows.append((first, full, each))
                count -= full * each
                rest = space - full_length if (full_length := each * length) < space else 0
                if rest:
                    if not runs[rest]:
                        left.append(rest)
                    runs[rest].append((first, full))
            if full < size:
                if count:
                    rows.append((first + full, 1, count))
                    rest = space - count * length
                    if rest:
                        if not runs[rest]:
                            left.append(rest)
                        runs[rest].append((first + full, 1))
                    full, count = full + 1, 0
                if full < size:
                    run.append((first + full, size - full))
            if at < len(spaces) and spaces[at] == space and not run:
                del spaces[at]
        for rest in left:
            insort(spaces, rest)
    return np.array(rows, dtype=np.int64).reshape(-1, 3), num_bins


def _expanded(rows: np.ndarray) -> np.ndarray:
    """The bin of each sequence, longest first."""
    first, size, each = rows.T
    starts = np.cumsum(size) - size
    bins = np.arange(int(size.sum()), dtype=np.int32)
    bins += np.repeat((first - starts).astype(np.int32), size)
    return np.repeat(bins, np.repeat(each, size))

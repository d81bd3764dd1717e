"""Best-fit-decreasing packing of whole sequences into windows, for instruction data.

Sequences of one length are placed together, and bins that were treated alike are one run of bin
numbers: the work is then per pair of (length, remaining space) that really meet, not per sequence.
The bins are those of placing one sequence at a time.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ext.jit import compiled


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
    placements, num_bins = compiled(_place)(counts, capacity)
    bins = np.empty(len(lengths), dtype=np.int32)
    # 16-bit keys are sorted by counting: linear, and stable.
    narrow = lengths.astype(np.uint16 if longest < 2**16 else np.int64)
    ascending = np.argsort(narrow, kind="stable")
    bins[ascending[int(counts[0]) :]] = _expanded(placements)[::-1]
    bins[ascending[: int(counts[0])]] = -1
    return Packing(bins=bins, num_bins=num_bins)


def _place(counts: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Rows of (first bin, bins, sequences in each), in the order of sequences, longest first."""
    newest = np.full(capacity + 1, -1, dtype=np.int64)  # by remaining space: its newest run,
    held = np.zeros(capacity // 64 + 1, dtype=np.int64)  # and of 64 spaces, how many have one
    runs, num_runs = np.empty((1024, 3), dtype=np.int64), 0  # first bin, bins, run before it
    rows, num_rows, num_bins = np.empty((1024, 3), dtype=np.int64), 0, 0
    for length in range(len(counts) - 1, 0, -1):
        count, space = counts[length], length
        while count:
            while space <= capacity and newest[space] < 0:
                space = space + 1 if held[space // 64] else (space // 64 + 1) * 64
            if space <= capacity:
                run = newest[space]
                first, size, newest[space] = runs[run, 0], runs[run, 1], runs[run, 2]
                held[space // 64] -= newest[space] < 0
            else:
                space, first, size = capacity, num_bins, -(-count // (capacity // length))
                num_bins += size
            each = space // length
            full = min(size, count // each)
            count -= full * each
            last = count if full < size else 0  # sequences in one bin that they do not fill
            count -= last
            past = full + (last > 0)
            for part in range(3):
                if part == 0:
                    begin, bins, inside = first, full, each
                elif part == 1:
                    begin, bins, inside = first + full, past - full, last
                else:
                    begin, bins, inside = first + past, size - past, 0
                rest = space - inside * length
                if bins and inside:
                    if num_rows == len(rows):
                        rows = np.concatenate((rows, np.empty_like(rows)))
                    rows[num_rows, 0], rows[num_rows, 1] = begin, bins
                    rows[num_rows, 2] = inside
                    num_rows += 1
                if bins and rest:
                    if num_runs == len(runs):
                        runs = np.concatenate((runs, np.empty_like(runs)))
                    held[rest // 64] += newest[rest] < 0
                    runs[num_runs, 0], runs[num_runs, 1] = begin, bins
                    runs[num_runs, 2] = newest[rest]
                    newest[rest] = num_runs
                    num_runs += 1
    return rows[:num_rows], num_bins


def _expanded(rows: np.ndarray) -> np.ndarray:
    """The bin of each sequence, longest first."""
    first, size, each = rows.T
    starts = np.cumsum(size) - size
    bins = np.arange(int(size.sum()), dtype=np.int32)
    bins += np.repeat((first - starts).astype(np.int32), size)
    return np.repeat(bins, np.repeat(each, size))

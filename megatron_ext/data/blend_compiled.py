"""The blend's order for constant shares, compiled by numba where that extra is installed.

Sources of equal shares take strict turns, so they are one class with one lag. Few classes are
scanned at every sample, as megatron-core scans all sources. Of many, only those are looked at that
can come within a small gap of the one that lags most during the next samples; the rest are sure to
be behind, and when the gap proves too small it is measured anew. Every decision is the scan's own
float64 comparison, so the order is equal bit for bit.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

FEW = 24
"""Classes up to which scanning all of them is fastest."""

HORIZON = 96
"""Samples between two looks at every class."""

Fill = Callable[[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray, np.ndarray], None]


def fill_order(
    shares: np.ndarray, counts: np.ndarray, first: int, order: np.ndarray, before: np.ndarray
) -> bool:
    """Fill ``order`` with the sources of samples ``first`` and on, ``before`` with how many samples
    each gave until then; ``counts`` moves along.

    Returns:
        False, with nothing done, where numba is not installed.
    """
    loops = compiled()
    if loops is None:
        return False
    weights, class_of, sizes = np.unique(shares, return_inverse=True, return_counts=True)
    members = np.argsort(class_of, kind="stable")
    starts = np.cumsum(sizes) - sizes
    taken = np.bincount(class_of, weights=counts).astype(np.int64)
    state = np.stack([starts, sizes, taken % sizes, taken // sizes])
    loops[len(weights) > FEW](weights, members, state, first, order, before)
    place = np.arange(len(shares)) - np.repeat(starts, sizes)
    counts[members] = np.repeat(state[3], sizes) + (place < np.repeat(state[2], sizes))
    return True


def scan(
    weights: np.ndarray,
    members: np.ndarray,
    state: np.ndarray,
    first: int,
    order: np.ndarray,
    before: np.ndarray,
) -> None:
    """Look at every class at every sample. Rows of ``state``: start, size, turn, rounds."""
    start, size, turn, rounds = state[0], state[1], state[2], state[3]
    for k in range(len(order)):
        x = float(max(first + k, 1))
        best, most = 0, weights[0] * x - rounds[0]
        for u in range(1, len(weights)):
            lag = weights[u] * x - rounds[u]
            if lag > most:
                best, most = u, lag
            elif lag == most and members[start[u] + turn[u]] < members[start[best] + turn[best]]:
                best = u
        order[k], before[k] = members[start[best] + turn[best]], rounds[best]
        turn[best] += 1
        if turn[best] == size[best]:
            turn[best] = 0
            rounds[best] += 1


def look_ahead(
    weights: np.ndarray,
    members: np.ndarray,
    state: np.ndarray,
    first: int,
    order: np.ndarray,
    before: np.ndarray,
) -> None:
    """As ``scan``, looking at every class once in HORIZON samples or when the gap fails."""
    start, size, turn, rounds = state[0], state[1], state[2], state[3]
    classes = len(weights)
    near = np.empty(classes, dtype=np.int64)  # classes that may be above the threshold,
    near_weight, near_rounds = np.empty(classes), np.empty(classes)  # and theirs, side by side
    lags = np.empty(classes)
    due = np.empty(HORIZON, dtype=np.int64)  # by step: the first class that becomes near then
    after = np.empty(classes, dtype=np.int64)  # and the next one of the same step
    # Lags are rounded by less than this: a threshold is only trusted beyond it.
    margin = 16.0 * 2.0**-52 * (weights.max() * (first + len(order)) + 1.0)
    gap, k = 0.02, 0
    while k < len(order):
        x = float(max(first + k, 1))
        horizon = min(HORIZON, len(order) - k)
        for u in range(classes):
            lags[u] = weights[u] * x - rounds[u]
        threshold = lags.max() - gap
        due[:horizon] = -1
        count = 0
        for u in range(classes):
            if lags[u] >= threshold:
                near[count], near_weight[count], near_rounds[count] = u, weights[u], rounds[u]
                count += 1
            elif lags[u] + weights[u] * horizon >= threshold:
                step = int((threshold - lags[u]) / weights[u])
                if step < horizon:
                    after[u] = due[step]
                    due[step] = u
        step = 0
        while step < horizon:
            x = float(max(first + k, 1))
            u = due[step]
            while u >= 0:
                near[count], near_weight[count], near_rounds[count] = u, weights[u], rounds[u]
                count += 1
                u = after[u]
            at, best, most = -1, -1, threshold + margin
            for j in range(count):
                lag = near_weight[j] * x - near_rounds[j]
                if lag >= most:
                    u = near[j]
                    if (
                        lag > most
                        or best < 0
                        or members[start[u] + turn[u]] < members[start[best] + turn[best]]
                    ):
                        at, best, most = j, u, lag
            if best < 0:  # all near classes fell below the threshold: others may be above
                break
            order[k], before[k] = members[start[best] + turn[best]], rounds[best]
            k += 1
            turn[best] += 1
            if turn[best] == size[best]:
                turn[best] = 0
                rounds[best] += 1
                near_rounds[at] += 1.0
                lag = most - 1.0
                if lag < threshold:
                    count -= 1
                    near[at] = near[count]
                    near_weight[at], near_rounds[at] = near_weight[count], near_rounds[count]
                    later = step + int((threshold - lag) / weights[best])
                    if later <= step:
                        later = step + 1
                    if later < horizon:
                        after[best] = due[later]
                        due[later] = best
            step += 1
        gap = min(1.3 * gap, 2.0) if step < horizon else max(0.6 * gap, 16.0 * margin)


@cache
def compiled() -> tuple[Fill, Fill] | None:
    """``scan`` and ``look_ahead`` as machine code; nothing where numba is not installed."""
    try:
        import numba  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None
    compile_ = numba.njit(cache=True)
    return compile_(scan), compile_(look_ahead)

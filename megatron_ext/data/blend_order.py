"""The blend's order for constant shares, in which most sources are only looked at near their turn.

Sources of equal shares take strict turns: they are one class with one lag, share * samples - given.
Few classes are all looked at, as megatron-core does; of many, those that are near. A class is near
when its lag may have reached a threshold; the others wait in a ring of steps for the first one at
which they could. A near class above the threshold lags more than all that wait. When none is above,
or too many are near, all are looked at again and the threshold moves. Every decision is a float64
comparison of a scan over all sources: the order is the scan's, bit for bit.
"""

import numpy as np

from megatron_ext.jit import compiled

FEW = 24
"""Classes up to which looking at all of them is fastest."""

MANY = 32
"""Near classes from which on the threshold is raised, at most once in 64 samples."""

RING = 1024
"""Steps in the ring, a power of 2; a class due later is passed over once a round."""


def fill_order(
    shares: np.ndarray, counts: np.ndarray, first: int, order: np.ndarray, before: np.ndarray
) -> None:
    """Fill ``order`` with the sources of samples ``first`` and on, ``before`` with how many samples
    each gave until then; ``counts`` moves along.
    """
    weights, class_of, sizes = np.unique(shares, return_inverse=True, return_counts=True)
    members = np.argsort(class_of, kind="stable")
    starts = np.cumsum(sizes) - sizes
    taken = np.bincount(class_of, weights=counts).astype(np.int64)
    state = np.stack([starts, sizes, taken % sizes, taken // sizes])
    loop = scan if len(weights) <= FEW else look_near
    compiled(loop)(weights, members, state, first, order, before)
    place = np.arange(len(shares)) - np.repeat(starts, sizes)
    counts[members] = np.repeat(state[3], sizes) + (place < np.repeat(state[2], sizes))


def scan(
    weights: np.ndarray,
    members: np.ndarray,
    state: np.ndarray,
    first: int,
    order: np.ndarray,
    before: np.ndarray,
) -> None:
    """Look at every class at every sample.

    Rows of ``state``, by class: first of its members, how many, whose turn, rounds taken.
    """
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


def look_near(
    weights: np.ndarray,
    members: np.ndarray,
    state: np.ndarray,
    first: int,
    order: np.ndarray,
    before: np.ndarray,
) -> None:
    """As ``scan``, looking at the classes near their turn."""
    start, size, turn, rounds = state[0], state[1], state[2], state[3]
    classes, steps = len(weights), len(order)
    near = np.empty(classes, dtype=np.int64)
    near_weight, near_rounds, lags = np.empty(classes), np.empty(classes), np.empty(classes)
    step_each = 1.0 / np.maximum(weights, 1e-12)  # steps in which a class's lag grows by one
    ring = np.full(RING, -1, dtype=np.int64)  # by step modulo RING: the first class due then,
    after = np.empty(classes, dtype=np.int64)  # the next one in the same place,
    due = np.empty(classes, dtype=np.int64)  # and the very step
    # Lags and due steps are rounded by less than this: the threshold is trusted beyond it.
    margin = 16.0 * 2.0**-52 * (weights.max() * (first + steps) + 1.0)
    gap = 8.0 / classes
    threshold, count, calm, k = 0.0, 0, 0, 0
    while k < steps:
        x = float(max(first + k, 1))
        u = ring[k & (RING - 1)]
        ring[k & (RING - 1)] = -1
        while u >= 0:
            following = after[u]
            if due[u] <= k:
                near[count], near_weight[count], near_rounds[count] = u, weights[u], rounds[u]
                count += 1
            else:
                after[u] = ring[k & (RING - 1)]
                ring[k & (RING - 1)] = u
            u = following
        most, best, tied = threshold + margin, -1, False
        for j in range(count):  # without a branch that cannot be foreseen
            lag = near_weight[j] * x - near_rounds[j]
            tied |= lag == most
            best = j if lag > most else best
            most = lag if lag > most else most
        if best < 0 or (count > MANY and k >= calm):
            gap = max(gap * (1.25 if best < 0 else 0.8), 4.0 * margin)
            calm = k + 64
            for u in range(classes):
                lags[u] = weights[u] * x - rounds[u]
            threshold = lags.max() - gap
            ring[:] = -1
            count = 0
            for u in range(classes):
                due[u] = k + int(max(threshold - lags[u], 0.0) * step_each[u])
            for u in range(classes):
                if due[u] <= k:
                    near[count], near_weight[count], near_rounds[count] = u, weights[u], rounds[u]
                    count += 1
                else:
                    after[u] = ring[due[u] & (RING - 1)]
                    ring[due[u] & (RING - 1)] = u
            continue
        if tied:  # of several that lag alike, the first source has it
            for j in range(best + 1, count):
                one, other = near[j], near[best]
                if near_weight[j] * x - near_rounds[j] == most and (
                    members[start[one] + turn[one]] < members[start[other] + turn[other]]
                ):
                    best = j
        u = near[best]
        order[k], before[k] = members[start[u] + turn[u]], rounds[u]
        turn[u] += 1
        if turn[u] == size[u]:
            turn[u] = 0
            rounds[u] += 1
            near_rounds[best] += 1.0
            wait = int(max(threshold - (most - 1.0), 0.0) * step_each[u])
            if wait > 0:
                count -= 1
                near[best] = near[count]
                near_weight[best], near_rounds[best] = near_weight[count], near_rounds[count]
                due[u] = k + wait
                after[u] = ring[due[u] & (RING - 1)]
                ring[due[u] & (RING - 1)] = u
        k += 1

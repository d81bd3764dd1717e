"""Best-fit packing: the bins of placing sequences one at a time, in far less time."""

from bisect import bisect_left, insort

import numpy as np
import pytest

from megatron_ext.data.packing import best_fit


def _one_at_a_time(lengths, capacity):
    """Number of bins and the space left in each, by the definition."""
    spaces, num_bins = [], 0
    for length in sorted(lengths.tolist(), reverse=True):
        at = bisect_left(spaces, length)
        num_bins += at == len(spaces)
        space = (spaces.pop(at) if at < len(spaces) else capacity) - length
        if space:
            insort(spaces, space)
    return num_bins, spaces


@pytest.mark.parametrize("seed", range(60))
def test_bins_are_those_of_one_sequence_at_a_time(seed):
    random = np.random.default_rng(seed)
    capacity = int(random.integers(3, 60))
    lengths = random.integers(1, capacity + 1, int(random.integers(1, 200)))
    packing = best_fit(lengths, capacity=capacity)
    loads = np.bincount(packing.bins, weights=lengths, minlength=packing.num_bins).astype(int)
    spaces = sorted((capacity - loads[loads < capacity]).tolist())
    assert (packing.num_bins, spaces) == _one_at_a_time(lengths, capacity)
    assert loads.max() <= capacity and loads.min() > 0


def test_members_hold_every_sequence_once_bin_by_bin():
    lengths = np.random.default_rng(0).integers(0, 50, 1000)
    packing = best_fit(lengths, capacity=64)
    order, starts = packing.members()
    assert sorted(order.tolist()) == np.flatnonzero(lengths).tolist()
    for number in range(packing.num_bins):
        inside = order[starts[number] : starts[number + 1]]
        assert (packing.bins[inside] == number).all() and lengths[inside].sum() <= 64


def test_many_sequences_reach_the_lower_bound_nearly():
    lengths = np.clip(np.random.default_rng(1).lognormal(6, 1, 200_000), 1, 4096).astype(int)
    bound = -(-lengths.sum() // 4096)
    packing = best_fit(lengths, capacity=4096)
    assert packing.num_bins - bound <= lengths.sum() / 1e6
    again = best_fit(lengths, capacity=4096)
    assert np.array_equal(packing.bins, again.bins)


def test_empty_sequences_and_no_sequences_have_no_bin():
    assert best_fit(np.array([0, 3, 0]), capacity=4).bins.tolist() == [-1, 0, -1]
    assert best_fit(np.array([], dtype=int), capacity=4).num_bins == 0


def test_a_sequence_longer_than_a_bin_is_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"seq_length=4 cannot hold 2 of 3.*longest of 9"):
        best_fit(np.array([3, 5, 9]), capacity=4)

"""Norms that stand out are told from those of a model that has peaks of its own."""

from collections import deque

from megatron_ext.train.numerics import ENOUGH, _spike

LEVEL = deque([1.0, 1.1, 0.9, 1.2] * 8)


def test_a_value_far_above_a_level_past_is_a_spike() -> None:
    assert _spike("norm", 9.0, LEVEL, 10.0) == ""
    assert "norm 15.000 is above 10 x the median" in _spike("norm", 15.0, LEVEL, 10.0)
    assert _spike("norm", 15.0, LEVEL, 0.0) == ""


def test_a_short_past_says_nothing() -> None:
    assert _spike("norm", 1e9, deque([1.0] * (ENOUGH - 1)), 10.0) == ""


def test_a_past_with_peaks_allows_higher_ones_and_no_more() -> None:
    # As seen in a healthy run: an Index with Norm-Head, no warm-up, random tokens.
    peaks = deque([15.1, 7.4, 10.4, 31.3, 15.9, 18.6, 54.6, 2.5, 27.0, 2.4] + [6.0] * 20)
    assert _spike("norm", 434.0, peaks, 10.0) == ""
    assert _spike("norm", 1200.0, peaks, 10.0)

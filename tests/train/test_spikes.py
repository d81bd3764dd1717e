"""Norms that stand out are told from those of a model that has peaks of its own."""

import json
from pathlib import Path

from megatron_ext.resilience.config import ENOUGH, WatchConfig
from megatron_ext.train.numerics import Numerics, _spike
from megatron_ext.train.state import TrainState

LEVEL = [1.0, 1.1, 0.9, 1.2] * 8


def test_a_value_far_above_a_level_past_is_a_spike() -> None:
    assert _spike("norm", 9.0, LEVEL, 10.0) == ""
    assert "norm 15.000 is above 10 x the median" in _spike("norm", 15.0, LEVEL, 10.0)
    assert _spike("norm", 15.0, LEVEL, 0.0) == ""


def test_a_short_past_says_nothing() -> None:
    assert _spike("norm", 1e9, [1.0] * (ENOUGH - 1), 10.0) == ""


def test_a_past_with_peaks_allows_higher_ones_and_no_more() -> None:
    # As seen in a healthy run: an Index with Norm-Head, no warm-up, random tokens.
    peaks = [15.1, 7.4, 10.4, 31.3, 15.9, 18.6, 54.6, 2.5, 27.0, 2.4] + [6.0] * 20
    assert _spike("norm", 434.0, peaks, 10.0) == ""
    assert _spike("norm", 1200.0, peaks, 10.0)


def test_the_past_is_bounded_and_the_checkpoints(tmp_path: Path) -> None:
    watch = WatchConfig(spike_window_steps=20)
    numerics, state = Numerics(watch, tmp_path, rank=0), TrainState()
    for k in range(50):
        numerics.taken(state, 0.1 * k, 0.3 * (k % 2))  # a norm of 0: fp16 passed the update over
    assert state.recent_losses == [0.1 * k for k in range(30, 50)]
    assert state.recent_norms == [0.3] * 20
    stored = TrainState.from_dict(json.loads(json.dumps(state.as_dict())))
    assert stored == state
    assert not numerics.against(stored).sound_norm(30.0)
    before = {k: v for k, v in state.as_dict().items() if not k.startswith("recent")}
    old = TrainState.from_dict(before)  # of a checkpoint that held no past
    assert numerics.against(old).sound_norm(30.0)
    assert not numerics.against(stored).sound_norm(30.0), "a load goes back to the checkpoint's"

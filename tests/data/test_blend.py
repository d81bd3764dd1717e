"""The blend: Megatron's order bit for bit, and shares that follow a ramp."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data import blend as blend_module
from megatron_ext.data import blend_order
from megatron_ext.data.blend import Blend


def _megatron_order(shares, size):
    import megatron

    folder = Path(next(iter(megatron.__path__))) / "core" / "datasets"
    (file,) = folder.glob("helpers_cpp*.so")
    spec = importlib.util.spec_from_file_location("helpers_cpp", file)
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    order, within = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    helpers.build_blending_indices(order, within, shares, len(shares), size, False)
    return order, within


def _shares(kind, count):
    rng = np.random.default_rng(count)
    raw = {
        "equal": np.ones(count),
        "decimal": rng.integers(1, 20, count) / 20,
        "uneven": rng.lognormal(0, 2, count),
    }[kind]
    return raw / raw.sum()


@pytest.mark.parametrize("kind", ["equal", "decimal", "uneven"])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 70, 300])
def test_order_is_megatrons_bit_for_bit(kind, count, monkeypatch):
    monkeypatch.setattr(blend_module, "BLOCK", 700)
    shares = _shares(kind, count)
    order, within = _megatron_order(shares, 4000)
    blend = Blend(shares)
    got = [np.concatenate(both)[:4000] for both in zip(*(blend.block(i) for i in range(6)))]
    assert np.array_equal(got[0], order) and np.array_equal(got[1], within)
    for k in (0, 1, 699, 700, 701, 3999):
        assert blend.at(k) == (order[k], within[k])
        want = np.bincount(order[:k], minlength=count)
        assert np.array_equal(blend.counts_before(k), want)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.25, 1 / 3, 0.999, 1e-6, 0.7])
def test_two_sources_are_megatrons_over_several_blocks(share):
    shares = np.array([1 - share, share])
    blend = Blend(shares)
    order, within = (np.concatenate(both) for both in zip(blend.block(0), blend.block(1)))
    want = _megatron_order(shares, len(order))
    assert np.array_equal(order, want[0]) and np.array_equal(within, want[1])


def test_the_threshold_is_moved_both_ways_and_changes_nothing(monkeypatch):
    """Most classes start near, then few are: the plain function, with its constants made small."""
    monkeypatch.setattr(blend_order, "compiled", lambda loop: loop)
    monkeypatch.setattr(blend_order, "FEW", 2)
    monkeypatch.setattr(blend_order, "MANY", 3)
    monkeypatch.setattr(blend_order, "RING", 8)
    for kind in ("decimal", "uneven"):
        shares = _shares(kind, 70)
        order, before = np.empty(1500, dtype=np.int16), np.empty(1500, dtype=np.int64)
        blend_order.fill_order(shares, np.zeros(70, dtype=np.int64), 0, order, before)
        want = _megatron_order(shares, 1500)
        assert np.array_equal(order, want[0]) and np.array_equal(before, want[1])


def test_any_block_may_be_asked_for_first(monkeypatch):
    monkeypatch.setattr(blend_module, "BLOCK", 100)
    shares = _shares("uneven", 5)
    forward = Blend(shares)
    blocks = [forward.block(i) for i in range(8)]
    for number in (7, 0, 3):
        assert all(map(np.array_equal, Blend(shares).block(number), blocks[number]))


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_ramp_gives_each_source_its_integral(power):
    start, end, samples = np.array([1.0, 0.0]), np.array([0.6, 0.4]), 5000
    blend = Blend(start, shares_end=end, samples=samples, ramp_power=power)
    for fraction in (0.1, 0.5, 1.0):
        k = int(samples * fraction)
        want = 0.4 * samples * fraction ** (power + 1) / (power + 1)
        assert blend.counts_before(k)[1] == pytest.approx(want, abs=1.5)


def test_mean_share_of_a_linear_ramp_is_its_middle():
    blend = Blend(np.array([0.9, 0.1]), shares_end=np.array([0.7, 0.3]), samples=10000)
    assert blend.counts_before(10000)[1] == pytest.approx(2000, abs=1)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_a_ramp_read_on_from_its_middle_keeps_its_shape(power):
    ramp = {"shares_end": np.array([0.6, 0.4]), "samples": 5000, "ramp_power": power}
    whole = Blend(np.array([1.0, 0.0]), **ramp)
    rest = Blend(np.array([1.0, 0.0]), begun=2000, **ramp)
    for k in (100, 1000, 3000, 4000):
        want = whole.counts_before(2000 + k) - whole.counts_before(2000)
        assert rest.counts_before(k) == pytest.approx(want, abs=2)

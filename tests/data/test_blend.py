"""The blend: Megatron's order bit for bit, and shares that follow a ramp."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data import blend as blend_module
from megatron_ext.data import blend_compiled
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
@pytest.mark.parametrize("compiled", [False, True])
def test_order_is_megatrons_bit_for_bit(kind, count, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(blend_compiled, "compiled", lambda: None)
    elif blend_compiled.compiled() is None:
        pytest.skip("numba is not installed")
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


@pytest.mark.parametrize("count", [5, 70, 300])
def test_the_compiled_loops_are_right_as_plain_python_too(count, monkeypatch):
    """So that they are tested where numba is not installed."""
    loops = blend_compiled.scan, blend_compiled.look_ahead
    monkeypatch.setattr(blend_compiled, "compiled", lambda: loops)
    for kind in ("equal", "decimal", "uneven"):
        shares = _shares(kind, count)
        order, before = np.empty(2000, dtype=np.int16), np.empty(2000, dtype=np.int64)
        counts = np.zeros(count, dtype=np.int64)
        for first in (0, 500, 1000, 1500):
            part = slice(first, first + 500)
            assert blend_compiled.fill_order(shares, counts, first, order[part], before[part])
        want = _megatron_order(shares, 2000)
        assert np.array_equal(order, want[0]) and np.array_equal(before, want[1])
        assert np.array_equal(counts, np.bincount(order, minlength=count))


@pytest.mark.parametrize("share", [0.5, 0.1, 0.25, 1 / 3, 0.999, 1e-6, 0.7])
def test_two_sources_in_closed_form_are_the_rule(share):
    shares = np.array([1 - share, share])
    order, before = np.empty(100_000, dtype=np.int16), np.empty(100_000, dtype=np.int64)
    assert blend_module.two_sources(shares, 0, order, before)
    want = _megatron_order(shares, 100_000)
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

"""Frequencies are those of transformers' rope types, channel by channel; factors are checked."""

import pytest
import torch

from megatron_ext.models import rope

TRAINED = 4096


def theirs(kind, *, base, head_dim, share, factor, length):
    """transformers' own frequencies for a config that says so."""
    from transformers import StableLmConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = StableLmConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=TRAINED,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": base,
            "factor": factor,
            "partial_rotary_factor": share,
        },
    )
    found, scaling = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    assert scaling == 1.0
    return found


@pytest.mark.parametrize(("head_dim", "share"), [(128, 1.0), (64, 0.25), (32, 1.0)])
@pytest.mark.parametrize("base", [1e4, 5e6])
@pytest.mark.parametrize("factor", [1.0, 2.5, 8.0])
def test_both_stretches_are_transformers_own(head_dim, share, base, factor):
    dim = int(head_dim * share)
    at = {"base": base, "head_dim": head_dim, "share": share, "factor": factor}
    ours = rope.linear(base, dim, factor=factor)
    assert ours.dtype == torch.float32 and ours.shape == (dim // 2,)
    torch.testing.assert_close(ours, theirs("linear", **at, length=None), rtol=0, atol=0)
    for length in (1, TRAINED, 5000, 32768):
        ours = rope.dynamic_ntk(base, dim, factor=factor, length=length, trained=TRAINED)
        torch.testing.assert_close(ours, theirs("dynamic", **at, length=length), rtol=1e-6, atol=0)


def test_neither_stretch_does_anything_where_nothing_is_to_be_done():
    plain = rope.frequencies(1e4, 128)
    assert torch.equal(rope.linear(1e4, 128, factor=1), plain)
    assert torch.equal(rope.dynamic_ntk(1e4, 128, factor=8, length=100, trained=4096), plain)


def test_dynamic_ntk_interpolates_the_slowest_pair_by_the_stretch_and_keeps_the_fastest():
    plain = rope.frequencies(1e4, 128)
    found = rope.dynamic_ntk(1e4, 128, factor=1, length=32768, trained=4096)
    assert float(found[0]) == float(plain[0])
    assert float(plain[-1] / found[-1]) == pytest.approx(8.0, rel=1e-5)


def test_a_factor_that_shortens_and_a_head_with_one_pair_are_refused():
    with pytest.raises(ValueError, match="factor of 0.5 would shorten"):
        rope.linear(1e4, 128, factor=0.5)
    with pytest.raises(ValueError, match="D > 2"):
        rope.dynamic_ntk(1e4, 2, factor=2, length=2, trained=1)

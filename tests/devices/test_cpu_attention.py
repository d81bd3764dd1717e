"""The CPU's training attention is SDPA, forward and backward, with and without kept scores."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_ext.devices import cpu_attention

B, D = 2, 16


def _inputs(heads, groups, length, dtype=torch.float32):
    torch.manual_seed(length)
    for n in (heads, groups, groups):  # as Megatron lays them out: [S, B, N, D]
        x = torch.randn(length, B, n, D).to(dtype).requires_grad_()
        yield x


def _both(qkv, scale=D**-0.5):
    views = [x.permute(1, 2, 0, 3) for x in qkv]
    yield cpu_attention.causal_attention(*views, scale)
    yield scaled_dot_product_attention(*views, is_causal=True, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("kept_bytes", [1 << 25, 0])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (7, 1), (14, 2)])
@pytest.mark.parametrize("length", [129, 300, 384])
def test_it_is_sdpa_forward_and_backward(monkeypatch, kept_bytes, heads, groups, length):
    monkeypatch.setattr(cpu_attention, "KEPT_BYTES", kept_bytes)
    qkv = list(_inputs(heads, groups, length))
    got, want = _both(qkv)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    grads = torch.autograd.grad((got * weight).sum(), qkv)
    wanted = torch.autograd.grad((want * weight).sum(), qkv)
    for one, other in zip(grads, wanted):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_bf16_is_as_near_to_fp32_as_sdpa_is():
    qkv = list(_inputs(6, 2, 700, torch.bfloat16))
    exact = [x.detach().float().requires_grad_() for x in qkv]
    want = list(_both(exact))[1]
    weight = torch.randn_like(want)
    wanted = torch.autograd.grad((want * weight).sum(), exact)
    errors = []
    for out in _both(qkv):
        grads = torch.autograd.grad((out.float() * weight).sum(), qkv)
        pairs = [(out.detach(), want.detach()), *zip(grads, wanted)]
        errors.append([float((a.float() - b).norm() / b.norm()) for a, b in pairs])
    for ours, torchs in zip(*errors):
        assert ours < max(1.5 * torchs, 0.005), errors


def test_it_is_taken_for_long_enough_whole_sequences_only():
    q, k, _ = (x.permute(1, 2, 0, 3) for x in _inputs(4, 2, 200))
    assert cpu_attention.suits(q, k)
    assert not cpu_attention.suits(q[:, :, -1:], k)
    assert not cpu_attention.suits(q[:, :, :64], k[:, :, :64])
    with torch.no_grad():  # as in the first pass over a layer that will be recomputed
        assert cpu_attention.suits(q, k)
    assert not cpu_attention.suits(q.half(), k.half())


def test_fp32_scores_too_large_to_keep_are_left_to_sdpa(monkeypatch):
    q, k, _ = (x.permute(1, 2, 0, 3) for x in _inputs(4, 2, 200))
    monkeypatch.setattr(cpu_attention, "KEPT_BYTES", 1000)
    assert not cpu_attention.suits(q, k)
    long = torch.empty(1, 1, 9000, D, dtype=torch.bfloat16)
    assert cpu_attention.suits(long, long)

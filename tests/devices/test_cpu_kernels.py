"""The CPU's stand-ins for fused kernels are Megatron's own unfused ones."""

import pytest
import torch

from megatron_ext.devices import cpu_kernels, device

S, B, N, D = 12, 2, 3, 16


def _angles(length, rotated):
    inverse = 1.0 / 10000.0 ** (torch.arange(0, rotated, 2) / rotated)
    angles = torch.outer(torch.arange(length), inverse)
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def _agree(got, want, x):
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    (one,) = torch.autograd.grad((got * weight).sum(), x)
    (other,) = torch.autograd.grad((want * weight).sum(), x)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rotated", [D, D // 4])
def test_rope_is_megatrons_unfused_rope(rotated):
    device.start()
    from megatron.core.models.common.embeddings import rope_utils

    torch.manual_seed(0)
    x = torch.randn(S, B, 2 * N, D, requires_grad=True)
    strided = x[:, :, ::2]
    freqs = _angles(S, rotated)
    want = rope_utils._apply_rotary_pos_emb_bshd(strided, freqs)
    _agree(cpu_kernels.rotate_SBND(strided, freqs), want, x)


def test_rope_of_packed_documents_starts_each_at_position_zero():
    device.start()
    from megatron.core.models.common.embeddings import rope_utils

    x = torch.randn(S, N, D, requires_grad=True)
    ends = torch.tensor([0, 4, 5, S], dtype=torch.int32)
    freqs = _angles(S, D)  # as long as the pack, where Megatron's own would count on
    alone = [
        rope_utils._apply_rotary_pos_emb_bshd(x[a:b].unsqueeze(1), freqs[: b - a]).squeeze(1)
        for a, b in ((0, 4), (4, 5), (5, S))
    ]
    _agree(cpu_kernels.rotate_TND(x, ends, freqs), torch.cat(alone), x)


def test_cosines_are_computed_once_for_all_layers():
    freqs, x = _angles(S, D), torch.randn(S, B, N, D)
    cpu_kernels.rotate_SBND(x, freqs)
    tables = cpu_kernels._tables(freqs, x.dtype)
    assert cpu_kernels._tables(freqs, x.dtype)[0] is tables[0]
    assert cpu_kernels._tables(freqs, torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_to_the_buffer(dtype):
    x, grad, buffer = torch.randn(8, 5), torch.randn(8, 6), torch.randn(6, 5)
    want = buffer + (grad.to(dtype).T @ x.to(dtype)).float()
    cpu_kernels.wgrad_gemm_accum_fp32(x.to(dtype), grad.to(dtype), buffer)
    torch.testing.assert_close(buffer, want)

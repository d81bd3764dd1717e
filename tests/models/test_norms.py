"""Norms and SwiGLU are torch's, forward and backward, in every dtype."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm, silu

from megatron_ext.models.norms import LayerNorm, RMSNorm
from megatron_ext.models.swiglu import SwiGLU

H = 48


def _config(dtype=torch.float32, sequence_parallel=False):
    return SimpleNamespace(
        use_cpu_initialization=True, params_dtype=dtype, sequence_parallel=sequence_parallel
    )


def _agree(got, want, inputs, **tolerance):
    torch.testing.assert_close(got, want, **tolerance)
    weight = torch.randn_like(want)
    grads = torch.autograd.grad((got * weight).sum(), inputs)
    for grad, wanted in zip(grads, torch.autograd.grad((want * weight).sum(), inputs)):
        torch.testing.assert_close(grad, wanted, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_torchs(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(_config(dtype), H, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 3, H, dtype=dtype, requires_grad=True)
    loose = {"rtol": 0.03, "atol": 0.06} if dtype == torch.bfloat16 else {}
    _agree(norm(x), rms_norm(x, (H,), norm.weight, 1e-5), (x, norm.weight), **loose)


def test_rms_norm_of_bf16_is_computed_in_fp32():
    x = torch.randn(4, 1, H, generator=torch.Generator().manual_seed(1)) * 100 + 50
    norm16, norm32 = RMSNorm(_config(torch.bfloat16), H), RMSNorm(_config(), H)
    x16 = x.bfloat16()
    assert torch.equal(norm16(x16), norm32(x16.float()).bfloat16())


def test_layer_norm_is_torchs():
    torch.manual_seed(0)
    norm = LayerNorm(_config(), H, eps=1e-6)
    x = torch.randn(5, 3, H, requires_grad=True)
    want = layer_norm(x, (H,), norm.weight, norm.bias, 1e-6)
    _agree(norm(x), want, (x, norm.weight, norm.bias))


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_every_parameter_of_a_norm_is_marked_for_sequence_parallelism(norm):
    for parameter in norm(_config(sequence_parallel=True), H).parameters():
        assert parameter.sequence_parallel is True
    for parameter in norm(_config(), H).parameters():
        assert parameter.sequence_parallel is False


def test_swiglu_gates_its_second_half_by_its_first():
    torch.manual_seed(0)
    x = torch.randn(6, 2, 2 * H, requires_grad=True)
    gate, up = x.chunk(2, dim=-1)
    _agree(SwiGLU(None)(x), silu(gate) * up, (x,))

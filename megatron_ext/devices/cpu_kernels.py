"""What Transformer Engine and apex fuse on a GPU, in few passes of torch on a CPU.

devices/cpu.py puts them where Megatron looks for those libraries. Shape legend: S sequence,
B micro-batch, T packed tokens, N heads, D channels of a head, R rotated channels.
"""

from typing import Any

import torch
from torch import Tensor


class _Rotate(torch.autograd.Function):
    """Turn the first R channels of every head; the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_first, out_second, out_rest = out.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=direction)
    if rest.numel():
        out_rest.copy_(rest)
    return out


def _tables(freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles, kept on the angles: every layer of a forward shares them.

    Megatron's angles hold each one twice, for both halves. They are fp32 whatever the model is.
    """
    kept = freqs.__dict__.get("cos_sin")
    if kept is None or kept[0].dtype != dtype:
        angles = freqs[..., : freqs.shape[-1] // 2]
        kept = (angles.cos().to(dtype), angles.sin().to(dtype))
        freqs.__dict__["cos_sin"] = kept
    return kept


def rotate_SBND(t: Tensor, freqs: Tensor, interleaved: bool = False, **_: Any) -> Tensor:
    """RoPE on [S, B, N, D] from angles [S, 1, 1, R]; Transformer Engine's signature."""
    cos, sin = _tables(freqs[: t.shape[0]] if freqs.shape[0] != t.shape[0] else freqs, t.dtype)
    return _Rotate.apply(t, cos, sin)


def rotate_TND(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, **_: Any) -> Tensor:
    """RoPE on packed documents [T, N, D], each counted from position 0."""
    ends = cu_seqlens.to(torch.long)
    starts = ends[:-1].repeat_interleave(ends.diff())
    cos, sin = _tables(freqs, t.dtype)
    position_T = torch.arange(t.shape[0]) - starts
    return _Rotate.apply(t, cos[position_T].squeeze(1), sin[position_T].squeeze(1))


def wgrad_gemm_accum_fp32(x: Tensor, grad: Tensor, main_grad: Tensor) -> None:
    """Add ``grad^T x`` into the gradient buffer inside the matmul; apex's signature."""
    if x.dtype == main_grad.dtype:
        main_grad.addmm_(grad.t(), x)
    else:
        main_grad.add_(grad.t() @ x)

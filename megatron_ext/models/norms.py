"""RMSNorm and LayerNorm of the local spec, usable under sequence parallelism.

Shape legend: S sequence, B micro-batch, H hidden.
"""

from typing import Any

import torch
from torch import Tensor


class _RMSNormFunction(torch.autograd.Function):
    """``x / rms(x) * weight`` in fp32, keeping only the input and one number a row.

    torch's CPU ``rms_norm`` is a chain of eight operators (3.2 ms forward and backward at
    1024 x 512 on one core, against 0.6 ms for its fused layer_norm); this is five times shorter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        power = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = power.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x32, scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        hat = x.float() * scale
        grad32 = grad.float()
        product = grad32 * hat
        grad_weight = product.reshape(-1, product.shape[-1]).sum(dim=0)
        # d x = scale * (g w - hat * mean(g w hat))
        mean = torch.mv(product.view(-1, product.shape[-1]), weight.float()).div_(x.shape[-1])
        grad_x = torch.mul(grad32, weight, out=product)
        grad_x.addcmul_(hat, mean.view(scale.shape), value=-1.0).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm with a weight."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _vector(config, hidden_size, 1.0)

    def forward(self, x_SBH: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return _RMSNormFunction.apply(x_SBH, self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """Mean-and-variance norm with weight and bias."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _vector(config, hidden_size, 1.0)
        self.bias = _vector(config, hidden_size, 0.0)

    def forward(self, x_SBH: Tensor) -> Tensor:
        """Normalise the last dimension."""
        shape = self.weight.shape
        return torch.nn.functional.layer_norm(x_SBH, shape, self.weight, self.bias, self.eps)


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


def _vector(config: Any, size: int, value: float) -> torch.nn.Parameter:
    """A replicated parameter; under SP each rank sees some positions, so gradients are summed."""
    # As Megatron places weights: the GPU (or what devices/cpu.py answers), or torch's default.
    place = None if config.use_cpu_initialization else torch.cuda.current_device()
    vector = torch.nn.Parameter(torch.full((size,), value, dtype=config.params_dtype, device=place))
    vector.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return vector

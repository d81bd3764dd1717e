"""SwiGLU of the local spec: ``silu(gate) * up``, keeping only its input for the backward pass."""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class _SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_x


class SwiGLU(MegatronModule):
    """[..., 2F] -> [..., F]; the first half is the gate.

    A MegatronModule because ``MLP.sharded_state_dict`` asks every child for its own.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)

    def forward(self, x: Tensor) -> Tensor:
        """Gate the second half by the first."""
        return _SwiGLUFunction.apply(x)

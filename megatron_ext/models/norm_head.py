"""Norm-Head: an output layer whose rows are L2-normalised in every forward (Index-1.9B).

``logits = h @ (W / |W_row|)^T``. The stored parameter is the raw W; rows live whole on one rank, so
tensor parallelism adds no communication. Shape legend: V vocabulary rows of this rank, H hidden.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

SMALLEST_NORM = 1e-12
"""Floor of the row norm, as torch.nn.functional.normalize has it."""


class _NormaliseRows(torch.autograd.Function):
    """``W / |row|`` in fp32; the gradient is projected off the row, unless the norm is detached."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, attached: bool) -> Tensor:
        norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=torch.float32)
        norm.clamp_(min=SMALLEST_NORM)
        hat = (weight / norm).to(weight.dtype)
        ctx.save_for_backward(hat, norm)
        ctx.attached = attached
        return hat

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        hat, norm = ctx.saved_tensors
        grad32 = grad.float()
        if ctx.attached:
            along = torch.linalg.vecdot(grad32, hat.float()).unsqueeze_(1)
            grad32 = torch.addcmul(grad32, hat.float(), along, value=-1.0)
        return (grad32 / norm).to(grad.dtype), None


def normalise_rows(weight_VH: Tensor, *, gradient: str = "attached") -> Tensor:
    """Rows of unit length, computed in fp32, in the dtype of the weight."""
    return _NormaliseRows.apply(weight_VH, gradient == "attached")


class NormHead(ColumnParallelLinear):
    """Megatron's output layer over normalised rows."""

    gradient: str
    """``attached`` or ``detached``: whether the gradient flows through the norm."""

    _eval_weight: Tensor | None
    """Normalised rows between two training forwards; never saved."""

    @classmethod
    def adopt(cls, layer: ColumnParallelLinear, *, gradient: str) -> "NormHead":
        """Turn the output layer that GPTModel built into a Norm-Head, in place."""
        layer.__class__ = cls
        layer.gradient, layer._eval_weight = gradient, None
        # The weight that is multiplied is not the parameter: it has no main_grad to add into.
        layer.gradient_accumulation_fusion = False
        return layer

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of this rank's rows, or of all when gathered."""
        return super().forward(input_, self.effective_weight(), runtime_gather_output)

    def effective_weight(self) -> Tensor:
        """The rows that are multiplied: made anew in training, cached in evaluation."""
        if self.training:
            self._eval_weight = None
            return normalise_rows(self.weight, gradient=self.gradient)
        if self._eval_weight is None:
            with torch.no_grad():
                self._eval_weight = normalise_rows(self.weight)
        return self._eval_weight

    def train(self, mode: bool = True) -> "NormHead":
        """Switching either way forgets the cache: the weight may change before the next forward."""
        self._eval_weight = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._eval_weight = None
        super()._load_from_state_dict(*args, **kwargs)

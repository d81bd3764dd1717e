"""Megatron's GPTModel with our loss: padding takes no part, Norm-Head and z-loss where asked.

Shape legend: S sequence, B micro-batch, V vocabulary columns of this rank.
"""

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_ext.models.config import ModelConfig
from megatron_ext.models.cross_entropy import vocab_parallel_cross_entropy
from megatron_ext.models.norm_head import NormHead


class GPT(GPTModel):
    """One pipeline chunk of a decoder."""

    def __init__(self, model: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.true_vocab_size = model.vocab_size
        self.z_loss_coefficient = model.z_loss_coefficient
        if self.post_process and model.norm_head:
            NormHead.adopt(self.output_layer, gradient=model.norm_head_gradient)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss of each token, [B, S]; z-loss is added in training only. Uses the logits up."""
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        loss_SB = vocab_parallel_cross_entropy(
            logits,
            labels.transpose(0, 1),
            first_column=first,
            valid_columns=self._valid_columns(first, logits.shape[-1]),
            group=self.pg_collection.tp,
            z_loss_coefficient=self.z_loss_coefficient if self.training else 0.0,
        )
        return loss_SB.transpose(0, 1).contiguous()

    def _postprocess(self, *args: Any, **kwargs: Any) -> Tensor:
        """Megatron's, with padding columns of returned logits at -inf: they are never sampled."""
        out = super()._postprocess(*args, **kwargs)
        if not self.post_process or kwargs.get("labels") is not None:
            return out
        columns = out.shape[-1]
        first = self.pg_collection.tp.rank() * columns if columns < self.vocab_size else 0
        valid = self._valid_columns(first, columns)
        if valid == columns:
            return out
        out = out.clone() if out.requires_grad else out
        out[..., valid:] = float("-inf")
        return out

    def _valid_columns(self, first: int, columns: int) -> int:
        """How many of ``columns`` that start at token ``first`` stand for real tokens."""
        return max(0, min(columns, self.true_vocab_size - first))

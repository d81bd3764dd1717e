"""Core attention of the local spec: torch's scaled_dot_product_attention (SDPA).

Causal without a mask tensor, KV heads shared without being copied, and packed documents each on
their own. Shape legend: S sequence, B micro-batch, T packed tokens, N query heads, G KV heads,
D channels of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_ext.devices import cpu_attention


class SDPACoreAttention(torch.nn.Module):
    """What Megatron's SelfAttention calls between rotary positions and the output projection."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError(
                f"parallel.context_parallel_size={config.context_parallel_size} needs Transformer "
                f"Engine's attention (kernels.transformer_impl=transformer_engine): the local one "
                f"sees whole sequences only; set it to 1."
            )
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[S, B, N, D] -> [S, B, N*D], or [T, N, D] -> [T, N*D] for packed documents.

        Always causal, whatever ``attention_mask`` says; fewer queries than keys are the newest.
        """
        if packed_seq_params is not None:
            return self._per_document(query, key, value, packed_seq_params.cu_seqlens_q)
        new, seen = query.shape[0], key.shape[0]
        context_BNSD = self._attend(
            *(x.permute(1, 2, 0, 3) for x in (query, key, value)),
            mask=_after_cache(query, seen) if 1 < new < seen else None,
            causal=new == seen,
        )
        s, b = query.shape[:2]
        return context_BNSD.permute(2, 0, 1, 3).reshape(s, b, -1)

    def _per_document(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, ends: Tensor) -> Tensor:
        """Each document attends to itself only, so that packing changes no logit."""
        lengths = (ends[1:] - ends[:-1]).tolist()
        documents = zip(*(x.split(lengths) for x in (q_TND, k_TGD, v_TGD)))
        out = [
            self._attend(*(x.transpose(0, 1).unsqueeze(0) for x in document), causal=True)
            .squeeze(0)
            .transpose(0, 1)
            for document in documents
        ]
        return torch.cat(out).flatten(1)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool
    ) -> Tensor:
        if causal and self.training and cpu_attention.suits(q, k):
            return cpu_attention.causal_attention(q, k, v, self.softmax_scale)
        return scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )


def _after_cache(query: Tensor, seen: int) -> Tensor:
    """Which of ``seen`` keys each of several new queries may read, when the rest is cached."""
    new = query.shape[0]
    return torch.ones(new, seen, dtype=torch.bool, device=query.device).tril(seen - new)

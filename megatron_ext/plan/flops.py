"""Floating-point operations of training one token, by two named conventions.

``full`` counts the whole s x s attention square, as most published MFU figures do; ``causal``
counts the half that a causal kernel computes. Neither counts recomputation (model FLOPs), the
embedding lookup, norms or activations. A multiplication with its addition is 2.
"""

from megatron_ext.legal import unknown_choice
from megatron_ext.models.config import ModelConfig
from megatron_ext.plan.parameters import count_parameters

CONVENTIONS = ("full", "causal")
ATTENTION_SHARE = {"full": 1.0, "causal": 0.5}


def flops_per_token(model: ModelConfig, seq_length: int, *, convention: str = "full") -> float:
    """FLOPs of the forward and backward pass of one token in a sequence of ``seq_length``.

    Raises:
        ValueError: the convention is neither ``full`` nor ``causal``.
    """
    if convention not in ATTENTION_SHARE:
        raise unknown_choice("logging.mfu_convention", convention, CONVENTIONS)
    count = count_parameters(model)
    weights = count.non_embedding_matmul + model.vocab_size * model.hidden_size
    # QK^T and PV: 2 matmuls, 2 FLOPs, 3 passes (1 forward, 2 backward) a channel and key.
    scores = 12 * model.num_attention_heads * model.head_dim() * seq_length * model.num_layers
    return 6 * weights + ATTENTION_SHARE[convention] * scores

"""The small model that stands for a published one: same ratios, far fewer parameters."""

import math
from dataclasses import replace

from megatron_ext.models.config import ModelConfig
from megatron_ext.plan.parameters import count_parameters

HEAD_DIMS = (8, 16, 24, 32, 48, 64)
"""Multiples of 8, as fused attention kernels ask; 8 itself is a last resort."""

MAX_LAYERS = 24


def shrink_model(
    model: ModelConfig,
    *,
    parameters: int,
    depth_factor: float,
    vocab_size: int,
    init_power: float,
) -> ModelConfig:
    """The shape nearest to ``parameters`` (non-embedding) and to ``depth_factor`` x depth/width.

    At least two KV heads and an even number of layers, so that TP 2 and PP 2 always fit. A
    kept-exact ratio is query heads per KV head; the FFN keeps its ratio to the width up to
    rounding to 16.

    Raises:
        ValueError: no small head carries the model's rotary share.
    """
    ratio = model.num_attention_heads // model.query_groups()
    aspect = depth_factor * model.num_layers / model.hidden_size
    best, best_cost = None, math.inf
    for head_dim in HEAD_DIMS:
        rotated = head_dim * model.rotary_percent
        if rotated != int(rotated) or int(rotated) % 2:
            continue
        for groups in range(2, 33, 2):
            for layers in range(2, MAX_LAYERS + 1, 2):
                candidate = _shape(model, layers, head_dim, groups * ratio, groups)
                cost = _distance(candidate, parameters, aspect)
                if cost < best_cost:
                    best, best_cost = candidate, cost
    if best is None:
        raise ValueError(
            f"model.rotary_percent={model.rotary_percent} gives no even number of channels at "
            f"head sizes {HEAD_DIMS}: this model cannot be shrunk."
        )
    init = model.init_method_std * (model.hidden_size / best.hidden_size) ** init_power
    return replace(best, vocab_size=vocab_size, padded_vocab_size=None, init_method_std=init)


def _shape(model: ModelConfig, layers: int, head_dim: int, heads: int, groups: int) -> ModelConfig:
    width = head_dim * heads
    ffn = max(round(width * model.ffn_hidden_size / model.hidden_size / 16), 1) * 16
    return replace(
        model,
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=None if groups == heads else groups,
        kv_channels=None,
    )


def _distance(model: ModelConfig, parameters: int, aspect: float) -> float:
    """How far a shape is from the wish in powers of e; see HEAD_DIMS."""
    size = abs(math.log(count_parameters(model).non_embedding / parameters))
    form = abs(math.log(model.num_layers / model.hidden_size / aspect))
    return size + form + (0.2 if model.head_dim() < 16 else 0.0)

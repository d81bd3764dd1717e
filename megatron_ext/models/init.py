"""Initial weights that do not depend on how the model is cut.

Every parameter is drawn whole from a generator seeded by its own name, then sliced, so TP, PP, VPP
and vocabulary padding change no initial weight.
"""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_ext.models.config import ModelConfig

RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")
"""Layers that write to the residual stream: drawn smaller when scaled_output_init is set."""


def no_init(weight: Tensor) -> Tensor:
    """Given to Megatron as init_method: it sets a weight's TP attributes, values come later."""
    return weight


def initialise(chunk: torch.nn.Module, model: ModelConfig, *, tp_rank: int, seed: int) -> None:
    """Fill every parameter of one model chunk in place."""
    with torch.no_grad():
        for name, parameter in canonical_parameters(chunk):
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                _draw(name, parameter, model, tp_rank, seed)


def canonical_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by the names they have in a model that is not cut into stages."""
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            layer = chunk.get_submodule(".".join(parts[:3]))
            parts[2] = str(layer.layer_number - 1)  # type: ignore[operator]
        yield ".".join(parts), parameter


def _draw(name: str, parameter: Tensor, model: ModelConfig, tp_rank: int, seed: int) -> None:
    std = model.init_method_std
    if name.endswith(RESIDUAL_OUTPUTS) and model.scaled_output_init:
        std /= math.sqrt(2.0 * model.num_layers)
    if name == "output_layer.weight" and not model.untie_embeddings_and_output_weights:
        name = "embedding.word_embeddings.weight"  # the last stage's copy of the tied weight
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest) >> 1)
    axis = getattr(parameter, "partition_dim", -1)
    cut = axis >= 0 and getattr(parameter, "tensor_model_parallel", False)
    shape = list(parameter.shape)
    if name.endswith("linear_fc1.weight"):
        shape[0] = 2 * model.ffn_hidden_size
    elif name.startswith(("embedding.", "output_layer.")):
        shape[0] = model.vocab_size
    elif cut:
        shape[axis] = _whole(name, model)
    whole = torch.empty(shape, device=parameter.device).normal_(0.0, std, generator=generator)
    if name.startswith(("embedding.", "output_layer.")):
        whole = _pad(whole, parameter, tp_rank, std, generator)
    parameter.copy_(_slice(name, whole, parameter, axis, tp_rank))


def _whole(name: str, model: ModelConfig) -> int:
    """Size of the cut axis of an attention or MLP weight before it is cut."""
    heads, groups, head_dim = model.num_attention_heads, model.query_groups(), model.head_dim()
    sizes = {
        "linear_qkv.weight": (heads + 2 * groups) * head_dim,
        "linear_proj.weight": heads * head_dim,
        "linear_fc2.weight": model.ffn_hidden_size,
    }
    return next(size for suffix, size in sizes.items() if name.endswith(suffix))


def _pad(
    whole: Tensor, parameter: Tensor, tp_rank: int, std: float, generator: torch.Generator
) -> Tensor:
    """Append padding rows up to the end of this rank's slice.

    They are random, not zero: Norm-Head's derivative at a zero row is 1e12.
    """
    missing = (tp_rank + 1) * parameter.shape[0] - whole.shape[0]
    if missing <= 0:
        return whole
    rows = whole.new_empty(missing, whole.shape[1]).normal_(0.0, std, generator=generator)
    return torch.cat((whole, rows))


def _slice(name: str, whole: Tensor, parameter: Tensor, axis: int, tp_rank: int) -> Tensor:
    """This rank's share of a whole weight."""
    if whole.shape == parameter.shape and tp_rank == 0:
        return whole
    if name.endswith("linear_fc1.weight"):  # [gate; up], each cut on its own
        half = parameter.shape[0] // 2
        halves = (part.narrow(0, tp_rank * half, half) for part in whole.chunk(2))
        return torch.cat(tuple(halves))
    size = parameter.shape[axis]
    return whole.narrow(axis, tp_rank * size, size)

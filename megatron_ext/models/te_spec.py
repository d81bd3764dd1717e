"""Transformer Engine's layers as the blocks of the same model.

What our models add needs no layer of its own here. GQA, partial rotary, RoPE base, QKV bias, and
LayerNorm with bias or RMSNorm come from TransformerConfig, which the layers read. Norm-Head, z-loss
and NEFTune's noise sit in the output layer and the embedding, outside the blocks. Documents packed
with ``cu_seqlens`` go through Megatron's ``PackedSeqParams`` (THD) into the attention.

Parameters are named by the fused layers (``linear_qkv.layer_norm_weight``) where the local spec
says ``input_layernorm.weight``; distributed-checkpoint keys are the same for both.
"""

from typing import TYPE_CHECKING

from megatron_ext.devices.config import KernelsConfig

if TYPE_CHECKING:
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.spec_utils import ModuleSpec

FUSED_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Parameter names of the local spec -> of this one, as prefixes inside a layer."""


def te_layer_spec() -> "ModuleSpec":
    """One transformer layer of fused norm and linear, with Transformer Engine's attention.

    Raises:
        ValueError: Transformer Engine cannot be used in this process.
    """
    from megatron.core.models.gpt.gpt_layer_specs import (
        HAVE_TE,
        get_gpt_layer_with_transformer_engine_spec,
    )

    if not HAVE_TE:
        raise ValueError(
            "kernels.transformer_impl=transformer_engine needs Transformer Engine, which was not "
            "importable when Megatron started: python -m tools.doctor says why."
        )
    return get_gpt_layer_with_transformer_engine_spec()


def attention_backend(kernels: KernelsConfig) -> "AttnBackend":
    """Megatron's word for the attention back end; it sets the NVTE_*_ATTN variables from it."""
    from megatron.core.transformer.enums import AttnBackend

    return AttnBackend[kernels.attention_backend]


def fused_name(local_name: str) -> str:
    """The name under this spec of a parameter of the local one, prefix of the layer included."""
    for local, fused in FUSED_NAMES.items():
        head, found, tail = local_name.partition(local)
        if found:
            return f"{head}{fused}{tail}"
    return local_name


def local_name(fused: str) -> str:
    """The inverse of ``fused_name``."""
    for local, prefix in FUSED_NAMES.items():
        head, found, tail = fused.partition(prefix)
        if found:
            return f"{head}{local}{tail}"
    return fused

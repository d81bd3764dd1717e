"""Transformer Engine's layers as the blocks of the same model.

What our models add needs no layer of its own here. GQA, partial rotary, RoPE base, QKV bias, and
LayerNorm with bias or RMSNorm come from TransformerConfig, which the layers read. Norm-Head, z-loss
and NEFTune's noise sit in the output layer and the embedding, outside the blocks. Documents packed
with ``cu_seqlens`` go through Megatron's ``PackedSeqParams`` (THD) into the attention.

Norms before a matmul are parameters of the fused layer here (``linear_qkv.layer_norm_weight``), and
modules of their own in the local spec, which stores them under the names of this one
(``local_spec.CHECKPOINT_KEYS``): a checkpoint of either loads into the other.
"""

from typing import TYPE_CHECKING

from megatron_ext.devices.config import KernelsConfig

if TYPE_CHECKING:
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.spec_utils import ModuleSpec


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

"""The layer spec without Transformer Engine: Megatron's parallel linears around our own parts."""

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ext.models.attention import SDPACoreAttention
from megatron_ext.models.config import ModelConfig
from megatron_ext.models.norms import NORMS
from megatron_ext.models.swiglu import SwiGLU

CHECKPOINT_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Norms are stored under the names of Transformer Engine's fused linears: one checkpoint, both."""


def local_layer_spec(model: ModelConfig) -> ModuleSpec:
    """One decoder layer."""
    norm = NORMS[model.normalization]
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SDPACoreAttention,
            linear_proj=RowParallelLinear,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        params={"ffn_hidden_size": model.ffn_hidden_size},
        submodules=MLPSubmodules(
            linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=SwiGLU
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=CHECKPOINT_KEYS,
        ),
    )


def local_block_spec(model: ModelConfig, num_layers: int) -> TransformerBlockSubmodules:
    """``num_layers`` decoder layers and the norm after the last."""
    return TransformerBlockSubmodules(
        layer_specs=[local_layer_spec(model)] * num_layers, layer_norm=NORMS[model.normalization]
    )

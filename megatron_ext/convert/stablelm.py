"""StableLM-2: Llama's table, with biases on the query, key and value projections and the norms."""

from megatron_ext.convert.llama import ATTENTION, EMBEDDING, FINAL_NORM, HEAD, HF, MC, MLP
from megatron_ext.convert.rules import FuseQKV, Rename

NORM_BIASES = (
    Rename(
        f"{HF}.input_layernorm.bias", f"{MC}.self_attention.linear_qkv.layer_norm_bias", "hidden"
    ),
    Rename(f"{HF}.post_attention_layernorm.bias", f"{MC}.mlp.linear_fc1.layer_norm_bias", "hidden"),
)
QKV_BIAS = FuseQKV(f"{HF}.self_attn.{{p}}_proj.bias", f"{MC}.self_attention.linear_qkv.bias")
FINAL_NORM_BIAS = Rename("model.norm.bias", "decoder.final_layernorm.bias", "hidden")

STABLELM = (
    EMBEDDING,
    *ATTENTION,
    QKV_BIAS,
    *MLP,
    *NORM_BIASES,
    FINAL_NORM,
    FINAL_NORM_BIAS,
    HEAD,
)

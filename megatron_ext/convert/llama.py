"""Llama: which Hugging Face tensors make which Megatron tensor. Yi and SmolLM2 are this table.

The table is the conversion; both directions read it. The norms' Megatron names are those under
which Megatron stores them with Transformer Engine's fused layers and with plain ones alike.
"""

from megatron_ext.convert.rules import FuseGate, FuseQKV, Ignore, Rename

HF = "model.layers.{i}"
MC = "decoder.layers.{i}"

EMBEDDING = Rename("model.embed_tokens.weight", "embedding.word_embeddings.weight", "vocab hidden")
FINAL_NORM = Rename("model.norm.weight", "decoder.final_layernorm.weight", "hidden")
HEAD = Rename("lm_head.weight", "output_layer.weight", "vocab hidden")

ATTENTION = (
    # ln1 and ln2 are the names of Yi's first release (YiForCausalLM).
    Rename(
        f"{HF}.input_layernorm.weight",
        f"{MC}.self_attention.linear_qkv.layer_norm_weight",
        "hidden",
        also=(f"{HF}.ln1.weight",),
    ),
    FuseQKV(
        f"{HF}.self_attn.{{p}}_proj.weight", f"{MC}.self_attention.linear_qkv.weight", "hidden"
    ),
    Rename(
        f"{HF}.self_attn.o_proj.weight", f"{MC}.self_attention.linear_proj.weight", "hidden query"
    ),
)
MLP = (
    Rename(
        f"{HF}.post_attention_layernorm.weight",
        f"{MC}.mlp.linear_fc1.layer_norm_weight",
        "hidden",
        also=(f"{HF}.ln2.weight",),
    ),
    FuseGate(f"{HF}.mlp.{{p}}_proj.weight", f"{MC}.mlp.linear_fc1.weight"),
    Rename(f"{HF}.mlp.down_proj.weight", f"{MC}.mlp.linear_fc2.weight", "hidden ffn"),
)

LLAMA = (EMBEDDING, *ATTENTION, *MLP, FINAL_NORM, HEAD)

IGNORED = (
    Ignore(f"{HF}.self_attn.rotary_emb.inv_freq", "recomputed from the RoPE base"),
    Ignore("model.rotary_emb.inv_freq", "recomputed from the RoPE base"),
)

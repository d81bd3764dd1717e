"""Tiny Hugging Face folders of every family, with random weights made by transformers."""

from pathlib import Path

import torch

SIZES = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}
YI = {
    "hidden_size": 112,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}  # 7 queries a KV head
ROPE = {"rope_type": "default", "rope_theta": 5e6}


def make(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **more) -> Path:
    """Save a model of family ``name`` and return its folder."""
    torch.manual_seed(5)
    model = _model(name, SIZES | more)
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or "norm" in key:  # transformers starts these at 0 and 1
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    return folder


def _model(name: str, sizes: dict) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, StableLmConfig, StableLmForCausalLM

    from megatron_ext.convert.hf_index import IndexConfig, IndexForCausalLM

    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**(sizes | YI), rope_parameters=ROPE))
    if name == "tied":
        sizes = sizes | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
        return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    if name == "skywork":
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
        model.config.architectures = ["SkyworkForCausalLM"]
        return model
    if name == "stablelm":
        sizes = sizes | {"num_attention_heads": 4, "num_key_value_heads": 4}
        return StableLmForCausalLM(StableLmConfig(**sizes, use_qkv_bias=True))
    sizes = sizes | {"num_attention_heads": 4}
    return IndexForCausalLM(IndexConfig(**sizes, rope_ratio=32.0))


FAMILIES = ("llama", "tied", "skywork", "stablelm", "index")

"""What a checkpoint says of itself, in words, without reading a weight."""

from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.folder import is_complete
from megatron_ext.convert.described import model_of
from megatron_ext.convert.families import parameter_count, tensor_count
from megatron_ext.convert.moves import moves
from megatron_ext.convert.sharded_reader import open_sharded


def inspect(path: Path) -> dict[str, Any]:
    """Plain JSON: shape, progress, layout, head, and whether everything is there.

    Raises:
        FileNotFoundError: it is no checkpoint.
        ValueError: it cannot be described.
    """
    folder = open_sharded(path)
    model, meta = model_of(path)
    keys = {move.key for move in moves(model)}
    optimizer = sorted({k.split(".")[2] for k in folder.tensors if k.startswith("optimizer.")})
    return {
        "path": str(path),
        "complete": is_complete(path),
        "step": meta["step"],
        "tokens": meta["tokens"],
        "phase": meta["phase"],
        "family": model.family,
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups(),
        "vocab_size": model.vocab_size,
        "padded_vocab": meta["padded_vocab"],
        "rotary_base": model.rotary_base,
        "rotary_percent": model.rotary_percent,
        "tied": not model.untie_embeddings_and_output_weights,
        "head": "norm-head, raw rows" if model.norm_head else "plain",
        "parameters": parameter_count(model),
        "huggingface_tensors": tensor_count(model),
        "missing": sorted(keys - set(folder.tensors)),
        "bytes": sum(tensor.bytes for tensor in folder.tensors.values()),
        "dtype": str(folder.tensors["decoder.final_layernorm.weight"].dtype).split(".")[1],
        "optimizer": optimizer,
        "layout": meta.get("layout"),
        "layer_map": meta.get("layer_map"),
        "tokenizer_sha256": meta.get("tokenizer_sha256"),
        "converted_from": meta.get("converted_from"),
        "versions": meta.get("versions"),
    }


def as_text(found: dict[str, Any]) -> str:
    """One fact a line."""
    return "\n".join(f"{key:20} {_words(value)}" for key, value in found.items())


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "-"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "-" if value is None else str(value)

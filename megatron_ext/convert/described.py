"""What a checkpoint says of itself, as conversion reads and writes it: run.json and meta.json."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.folder import describe
from megatron_ext.config import RunConfig
from megatron_ext.models.config import ModelConfig
from megatron_ext.train.config import PhaseConfig

RUN = "run.json"
ASSET = "huggingface."
"""Prefix of tokenizer and generation files that travel in a checkpoint (which has no folders)."""


def model_of(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The shape a checkpoint holds, and its whole description.

    The RoPE base is the one in force when it was saved, not the one its run began with.

    Raises:
        ValueError: the checkpoint is incomplete, or does not say what it holds.
    """
    meta = describe(path)
    if not (path / RUN).is_file():
        raise ValueError(f"{path / RUN} is missing: the checkpoint does not say its shape.")
    stored = json.loads((path / RUN).read_text())["model"]
    known = {f.name for f in fields(ModelConfig)}
    unknown = sorted(set(stored) - known)
    if unknown:
        raise ValueError(f"{path / RUN}: model.{unknown[0]} is not known to this version.")
    model = ModelConfig(**stored)
    return replace(model, rotary_base=float(meta.get("rotary_base", model.rotary_base))), meta


def run_of(model: ModelConfig, name: str) -> RunConfig:
    """The run that a converted checkpoint stands for: the shape, and nothing trained yet."""
    return RunConfig(name=name, model=model, phases=[PhaseConfig(tokens=1)])


def description(model: ModelConfig, *, source: dict[str, Any], **more: Any) -> dict[str, Any]:
    """meta.json of a checkpoint that no trainer has touched."""
    import torch

    return {
        "step": 0,
        "tokens": 0,
        "phase": 0,
        "vocab_size": model.vocab_size,
        "padded_vocab": model.padded_vocab(1),
        "norm_head": model.norm_head,
        "rotary_base": model.rotary_base,
        "layer_map": list(range(model.num_layers)),
        "layout": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1},
        "versions": {"torch": torch.__version__},
        "optimizer": False,
        "converted_from": source,
        **more,
    }


def run_json(run: RunConfig) -> bytes:
    """run.json of a checkpoint."""
    return (json.dumps(asdict(run), indent=1, ensure_ascii=False) + "\n").encode()

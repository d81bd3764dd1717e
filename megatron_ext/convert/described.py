"""What a checkpoint says of itself, as conversion reads and writes it: run.json and meta.json."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.folder import DamagedCheckpoint, describe
from megatron_ext.checkpoint.resumable import RUN
from megatron_ext.config import RunConfig
from megatron_ext.digest import sha256_of
from megatron_ext.models.config import ModelConfig

STATE = "state.json"
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
    sealed = meta["files"].get(RUN, {}).get("sha256")
    if sha256_of(path / RUN, follow_links=False) != sealed:
        raise DamagedCheckpoint(f"{path / RUN} has other bytes than were written")
    run = json.loads((path / RUN).read_text())
    stored = run.get("model") if isinstance(run, dict) else None
    if not isinstance(stored, dict):
        raise DamagedCheckpoint(f"{path / RUN} does not describe a model")
    known = {f.name for f in fields(ModelConfig)}
    unknown = sorted(set(stored) - known)
    if unknown:
        raise ValueError(f"{path / RUN}: model.{unknown[0]} is not known to this version.")
    model = ModelConfig(**stored)
    return replace(model, rotary_base=float(meta.get("rotary_base", model.rotary_base))), meta


def description(model: ModelConfig, *, dtype: str, **more: Any) -> dict[str, Any]:
    """meta.json of a checkpoint that no trainer has touched."""
    return {
        "step": 0,
        "tokens": 0,
        "phase": 0,
        "vocab_size": model.vocab_size,
        "padded_vocab": model.padded_vocab(1),
        "norm_head": model.norm_head,
        "rotary_base": model.rotary_base,
        "dtype": dtype,
        "layer_map": None,
        "layout": None,
        "optimizer": None,
        "versions": {"torch": version("torch")},
        **more,
    }


def documents(model: ModelConfig, *, name: str) -> dict[str, bytes]:
    """The run a converted checkpoint stands for: its shape, and nothing trained yet."""
    run = RunConfig(name=name, model=model, phases=[])
    state = {"step": 0, "tokens": 0, "phase": 0}
    return {RUN: as_json(asdict(run)), STATE: as_json(state)}


def as_json(content: dict[str, Any]) -> bytes:
    """A document of a checkpoint."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


@contextmanager
def carried_tokenizer(path: Path, other: Path | None) -> Iterator[Path]:
    """A folder with the tokenizer that a checkpoint carries, or ``other`` where one is named."""
    if other is not None:
        yield other if other.is_dir() else other.parent
        return
    with tempfile.TemporaryDirectory() as folder:
        for asset in path.glob(f"{ASSET}*"):
            shutil.copyfile(asset, Path(folder) / asset.name.removeprefix(ASSET))
        yield Path(folder)

"""Load a checkpoint into a run of any layout, or refuse it before a single weight has changed."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint import ranks, rng
from megatron_ext.checkpoint.reader import TensorReader
from megatron_ext.checkpoint.save import STATE, layout
from megatron_ext.checkpoint.shard import Slot
from megatron_ext.checkpoint.state import MASTER, OPTIMIZER, slots
from megatron_ext.models.fp8_history import PREFIX, prepare
from megatron_ext.optim.moments import MOMENTS, set_adam_step

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_ext.config import RunConfig

logger = logging.getLogger(__name__)


def load(
    path: Path,
    *,
    run: "RunConfig",
    chunks: Sequence[Any],
    optimizer: "MegatronOptimizer | None",
    groups: "ProcessGroupCollection",
    load_optimizer: bool = True,
    verified: bool = False,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fill ``chunks`` and ``optimizer`` from ``path``; return the trainer's state. Collective.

    Without ``load_optimizer`` the moments stay as they are, but fp32 masters are filled. Learning
    rate and weight decay are never taken: they are the configuration's. Random streams go on at
    the layout they were saved with, and start anew under another. What ``about`` names
    (``tokenizer_sha256``) must be as stored.

    Raises:
        DamagedCheckpoint: a file is not as it was written (skipped with ``verified``).
        ValueError: the checkpoint is of another model; the first mismatch is named.
    """
    meta = folders.describe(path) if verified else verify_together(path)
    _check_description(path, meta, run, about or {})
    wanted: list[Slot] = []

    def check() -> TensorReader:
        reader = TensorReader(path)
        prepare(chunks, run)
        for slot in slots(chunks, optimizer, moments=load_optimizer):
            if not _has_history(slot, reader):
                continue
            wanted.append(_source(slot, reader))
            _check(path, wanted[-1], reader, run.model.vocab_size)
        return reader

    def fill() -> None:
        for slot in wanted:
            if slot.flexible and _is_moment(slot):
                slot.data.zero_()  # padding rows that the checkpoint does not have
        reader.fill(wanted)
        if optimizer is not None and load_optimizer:
            _restore_optimizer(optimizer, meta["optimizer"])
        _restore_rng(reader, meta, run)

    reader = ranks.together(check)
    ranks.together(fill)
    return json.loads((path / STATE).read_bytes())


def verify_together(path: Path) -> dict[str, Any]:
    """``folder.verify`` with the files shared out between the ranks. Collective.

    Raises:
        DamagedCheckpoint: on every rank, what the first rank to find damage says.
    """
    share = (ranks.rank(), ranks.world_size())
    return ranks.together(lambda: folders.verify(path, share=share))


def _check_description(path: Path, meta: dict, run: "RunConfig", about: dict[str, Any]) -> None:
    model = run.model
    asked = {"vocab_size": model.vocab_size, "norm_head": model.norm_head}
    for name, value in asked.items():
        if name in meta and meta[name] != value:
            raise ValueError(
                f"model.{name}={value} is not what {path} was trained with "
                f"(model.{name}={meta[name]}): load a checkpoint of this model, or set it so."
            )
    for name, value in about.items():
        if meta.get(name) is not None and value is not None and meta[name] != value:
            raise ValueError(
                f"{name}={value} is not what {path} was trained with ({meta[name]}): "
                f"token numbers would mean other words."
            )


def _source(slot: Slot, reader: TensorReader) -> Slot:
    """Where the checkpoint keeps what ``slot`` wants, when the number format has changed.

    A bf16 run keeps fp32 masters beside bf16 weights; an fp32 run has only weights.
    """
    master = f"{OPTIMIZER}.{MASTER}."
    if slot.key.startswith(master) and slot.key not in reader:
        return replace(slot, key=slot.key.removeprefix(master))
    fp32_weight = slot.data.dtype == torch.float32 and not slot.key.startswith(OPTIMIZER)
    if fp32_weight and master + slot.key in reader:
        return replace(slot, key=master + slot.key)
    return slot


def _check(path: Path, slot: Slot, reader: TensorReader, vocab_size: int) -> None:
    """Refuse a tensor that is not there, or not of the wanted shape but for padding rows."""
    stored = reader.tensors.get(slot.key)
    if stored is None and slot.key.startswith(OPTIMIZER):
        raise ValueError(
            f"{path} holds no optimizer state for {slot.key.removeprefix(OPTIMIZER)[1:]}: "
            f"set checkpoint.load_optimizer=false to take its weights alone."
        )
    if stored is None:
        raise ValueError(f"{path} is of another model: it holds no {slot.key}.")
    same = stored.shape == slot.shape
    if slot.flexible and not same:
        rows = min(stored.shape[0], slot.shape[0])
        same = stored.shape[1:] == slot.shape[1:] and rows >= vocab_size
    if not same:
        raise ValueError(
            f"{path} is of another model: {slot.key} is {list(stored.shape)} there and "
            f"{list(slot.shape)} here."
        )


def _has_history(slot: Slot, reader: TensorReader) -> bool:
    """False for an FP8 history to begin anew: of another format before, or of another length."""
    stored = reader.tensors.get(slot.key)
    return not slot.key.startswith(PREFIX) or (stored is not None and stored.shape == slot.shape)


def _is_moment(slot: Slot) -> bool:
    return any(slot.key.startswith(f"{OPTIMIZER}.{name}.") for name in MOMENTS)


def _restore_optimizer(optimizer: "MegatronOptimizer", stored: dict[str, Any]) -> None:
    """What is not a tensor of a parameter's shape: Adam's step, the fp16 loss scale."""
    set_adam_step(optimizer, stored["adam_step"])
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        scaler = getattr(one, "grad_scaler", None)
        if scaler is None or not stored["loss_scale"]:
            continue
        scale = dict(stored["loss_scale"])
        tensor = torch.tensor([scale.pop("scale")], dtype=torch.float32)
        scaler.load_state_dict({"scale": tensor, **{k: int(v) for k, v in scale.items()}})


def _restore_rng(reader: TensorReader, meta: dict[str, Any], run: "RunConfig") -> None:
    key = f"rng.rank_{ranks.rank()}"
    same = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
    here, there = layout(run), meta.get("layout") or {}
    if key in reader and all(here[name] == there.get(name) for name in same):
        rng.restore(reader.read(key))
    elif ranks.rank() == 0:
        logger.info("saved at %s: random streams start anew", there)

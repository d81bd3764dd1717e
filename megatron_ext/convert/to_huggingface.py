"""Distributed checkpoint of any layout to Hugging Face folder, streaming; read back at the end."""

import json
import zlib
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_ext.atomic import write_text
from megatron_ext.convert import tokenizer_files
from megatron_ext.convert.described import model_of
from megatron_ext.convert.hf_config import read_config, write_config
from megatron_ext.convert.huggingface import open_folder
from megatron_ext.convert.huggingface_writer import SHARD_BYTES, FolderWriter
from megatron_ext.convert.moves import Move, match, moves, source_shapes
from megatron_ext.convert.norm_head import fold
from megatron_ext.convert.report import Report
from megatron_ext.convert.sharded_reader import ShardedFolder, open_sharded
from megatron_ext.convert.stored import BLOCK, memory
from megatron_ext.convert.to_megatron import tokenizer_sha256
from megatron_ext.convert.unfinished import whole_or_absent
from megatron_ext.convert.workers import Progress, run_all
from megatron_ext.models.config import ModelConfig

NOT_WEIGHTS = {
    "optimizer.": "optimizer state",
    "fp8.": "FP8 scaling history",
    "rng.": "random number state",
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_huggingface(
    source: Path,
    target: Path,
    *,
    workers: int = 2,
    dtype: torch.dtype | None = None,
    fold_norm_head: bool = False,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
    token_ids: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Convert a checkpoint to a model folder.

    Args:
        source: a checkpoint folder.
        target: must not exist yet.
        workers: threads.
        dtype: of the written weights; None keeps each tensor's own.
        fold_norm_head: divide the head's rows by their length and write a plain Llama.
        shard_bytes: largest size of a weight file.
        tokenizer: a tokenizer file or a folder of them; None takes what the checkpoint carries.
        token_ids: bos, eos and pad ids; None takes those the checkpoint came with.
        progress: told bytes done and bytes in all.

    Raises:
        ValueError: the checkpoint is incomplete, or holds a tensor no rule reads.
    """
    model, meta = model_of(source)
    folder = open_sharded(source)
    plan = moves(model)
    report = _report(source, target, model, meta, _left_out(folder, plan))
    _refuse_fold(fold_norm_head, model)
    shards = _layout(folder, plan, model, dtype)
    ids = token_ids or {k: v for k in TOKEN_IDS if (v := _origin(meta).get(k)) is not None}
    with whole_or_absent(target) as aside:
        writer = FolderWriter(aside, shards, shard_bytes=shard_bytes)
        try:
            sums = _write_tensors(
                writer, plan, folder, model, report, workers, fold_norm_head, progress
            )
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
        name = str(next(iter(shards.values()))[1]).removeprefix("torch.")
        ids = tokenizer_files.write(aside, source, tokenizer, ids)
        config = write_config(model, dtype=name, tokens=ids, folded=fold_norm_head)
        write_text(aside / "config.json", json.dumps(config, indent=2) + "\n")
        report.tokenizer_sha256 = tokenizer_sha256(aside)
        _check_tokenizer(report.tokenizer_sha256, meta, tokenizer)
        _read_back(aside, model, sums, workers)
    if fold_norm_head:
        report.head = "norm-head, folded"
    report.close(plan)
    return report


def _write_tensors(
    writer: FolderWriter,
    plan: list[Move],
    folder: ShardedFolder,
    model: ModelConfig,
    report: Report,
    workers: int,
    folding: bool,
    progress: Callable[[int, int], None],
) -> dict[str, dict[int, int]]:
    """Fill the shards; per tensor, a CRC-32 of each run of rows by its first row."""
    sums: dict[str, dict[int, int]] = {name: {} for name in writer.places}

    def cost(move: Move) -> int:
        return prod(move.shape) * folder.tensors[move.key].dtype.itemsize

    def work(move: Move) -> None:
        stored = folder.tensors[move.key]
        dtype = writer.places[move.pieces[0].name].dtype
        folds = folding and move.rule.megatron == "output_layer.weight"
        for piece in move.pieces:
            sums[piece.name][piece.source_row] = 0
            for done, rows in _steps(piece.rows, prod(move.shape[1:]) * stored.dtype.itemsize):
                tensor = stored.read(move.layer, rows=(piece.row + done, rows)).to(dtype)
                tensor = fold(tensor) if folds else tensor
                writer.write_rows(piece.name, tensor, row=piece.source_row + done)
                before = sums[piece.name][piece.source_row]
                sums[piece.name][piece.source_row] = zlib.crc32(memory(tensor), before)
        name = str(dtype).removeprefix("torch.")
        padding = 0 if move.layer is not None else stored.shape[0] - move.shape[0]
        report.add(move, dtype=name, size=prod(move.shape) * dtype.itemsize, padding_rows=padding)

    done = Progress(sum(map(cost, plan)), progress)
    # A tensor is never held, so that the memory budget of tensors has nothing to limit.
    run_all(plan, work, cost=cost, workers=workers, done=done, budget=done.total)
    return sums


def _steps(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """``rows`` as (first, number) in steps of about a block."""
    step = max(BLOCK // row_bytes, 1)
    return ((row, min(step, rows - row)) for row in range(0, rows, step))


def _layout(
    folder: ShardedFolder, plan: list[Move], model: ModelConfig, dtype: torch.dtype | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Every tensor to write, in order; refuses a checkpoint that is not of this shape."""
    shapes = source_shapes(model)
    layout = {}
    for move in plan:
        tensor = folder.tensors.get(move.key)
        if tensor is None:
            raise ValueError(
                f"{folder.path} does not hold {move.key}, of which {move.sources()[0]} is made."
            )
        lead = () if move.layer is None else (model.num_layers,)
        rows, *columns = tensor.shape[len(lead) :]
        enough = rows >= move.shape[0] if lead == () else rows == move.shape[0]
        if tensor.shape[: len(lead)] != lead or not enough or tuple(columns) != move.shape[1:]:
            raise ValueError(
                f"{folder.path}: {move.key} is {list(tensor.shape)}, and run.json makes it "
                f"{[*lead, *move.shape]}."
            )
        for name in move.sources():
            layout[name] = (shapes[name], dtype or tensor.dtype)
    return layout


def _left_out(folder: ShardedFolder, plan: list[Move]) -> dict[str, str]:
    """What a checkpoint holds besides the weights, by kind; refuses what is of no known kind."""
    read = {move.key for move in plan}
    kinds: dict[str, int] = {}
    for key in folder.tensors:
        if key in read:
            continue
        kind = next((why for start, why in NOT_WEIGHTS.items() if key.startswith(start)), None)
        if kind is None:
            raise ValueError(
                f"{folder.path}: {key} is read by no rule, and would be lost: the checkpoint is "
                f"not of the family that its run.json names."
            )
        kinds[kind] = kinds.get(kind, 0) + 1
    return {f"{count} entries": kind for kind, count in kinds.items()}


def _refuse_fold(asked: bool, model: ModelConfig) -> None:
    if asked and not model.norm_head:
        raise ValueError(
            "--fold-norm-head: the checkpoint has a plain head (model.norm_head=false), and "
            "there is nothing to fold: leave the option out."
        )


def _check_tokenizer(found: str, meta: dict[str, Any], tokenizer: Path | None) -> None:
    trained = meta.get("tokenizer_sha256")
    if found and trained and found != trained:
        raise ValueError(
            f"--tokenizer {tokenizer} has SHA-256 {found[:16]}..., and the checkpoint was trained "
            f"with {trained[:16]}...: token numbers would mean other words."
        )


def _origin(meta: dict[str, Any]) -> dict[str, Any]:
    return meta.get("converted_from") or {}


def _report(
    source: Path, target: Path, model: ModelConfig, meta: dict[str, Any], left: dict[str, str]
) -> Report:
    report = Report("megatron-to-hf", str(source), str(target))
    report.family, report.layers = model.family, model.num_layers
    report.vocab_size = model.vocab_size
    report.padded_vocab = int(meta.get("padded_vocab", model.vocab_size))
    report.rotary_base, report.rotary_percent = model.rotary_base, model.rotary_percent
    report.tied = not model.untie_embeddings_and_output_weights
    report.head = "norm-head, raw rows" if model.norm_head else "plain"
    report.left_out = left
    return report


def _read_back(
    aside: Path, model: ModelConfig, sums: dict[str, dict[int, int]], workers: int
) -> None:
    """Open the folder as a reader would, and compare every byte with what was sent to it.

    Raises:
        OSError: the disk returns something else than was written.
    """
    folder = open_folder(aside)
    again = read_config(folder.config)
    for key in ("vocab_size", "num_layers", "rotary_base", "rotary_percent", "norm_head"):
        if getattr(again, key) != getattr(model, key):
            raise OSError(
                f"{aside / 'config.json'} reads back {key}={getattr(again, key)}, and "
                f"{getattr(model, key)} was meant"
            )
    found, _ = match(folder.tensors, again)
    jobs = []
    for name, runs in sums.items():
        starts = sorted(runs)
        jobs += [(name, *run) for run in zip(starts, [*starts[1:], found[name].shape[0]])]

    def check(job: tuple[str, int, int]) -> None:
        name, start, end = job
        value = 0
        for part in found[name].blocks(start, end - start):
            value = zlib.crc32(part, value)
        if value != sums[name][start]:
            raise OSError(f"{found[name].path}: {name} reads back other bytes than written")

    run_all(jobs, check, cost=lambda job: BLOCK, workers=workers)

"""Hugging Face folder to distributed checkpoint, streaming: a block a worker in memory.

Every rule moves whole rows, so a Megatron tensor is a series of runs of Hugging Face bytes,
whatever the fusing: they are read, hashed and written block by block.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.folder import seal
from megatron_ext.checkpoint.index import StoredTensor
from megatron_ext.checkpoint.shard import Slot
from megatron_ext.convert.described import ASSET, description, documents
from megatron_ext.convert.hf_config import RECORD, read_config
from megatron_ext.convert.huggingface import HuggingFaceFolder, open_folder
from megatron_ext.convert.moves import Move, match, moves
from megatron_ext.convert.report import Report
from megatron_ext.convert.sharded_writer import Files, add_files, finish, slot, write_tensors
from megatron_ext.convert.stored import BLOCK, Stored, memory
from megatron_ext.convert.unfinished import whole_or_absent
from megatron_ext.convert.workers import Progress
from megatron_ext.models.config import ModelConfig

WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "arcade100k.tiktoken")

logger = logging.getLogger(__name__)


def to_megatron(
    source: Path,
    target: Path,
    *,
    workers: int = 2,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Convert a model folder to a checkpoint that loads at any parallel sizes.

    Args:
        source: a Hugging Face folder.
        target: must not exist yet.
        workers: threads.
        dtype: of the written weights; None keeps each tensor's own.
        progress: told bytes done and bytes in all.

    Raises:
        ValueError: no table reads the folder; nothing is left behind.
    """
    folder = open_folder(source)
    model = read_config(folder.config)
    found, left_out = match(folder.tensors, model)
    for name, stored in found.items():
        if stored.dtype not in WEIGHTS:
            raise ValueError(f"{stored.path}: {name} is {stored.dtype}, which is not a weight.")
    plan = moves(model)
    report = _report(folder, source, target, model, left_out)
    with whole_or_absent(target) as aside:
        table, files = _write_tensors(aside, plan, found, model, report, workers, dtype, progress)
        _describe(aside, folder, model, report, files | finish(aside, table, {}))
    report.close(plan)
    return report


def _write_tensors(
    aside: Path,
    plan: list[Move],
    found: dict[str, Stored],
    model: ModelConfig,
    report: Report,
    workers: int,
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, StoredTensor], Files]:
    def cost(move: Move) -> int:
        return prod(move.shape) * found[move.pieces[0].name].dtype.itemsize

    def make(move: Move) -> Slot:
        kind, rows = _kind(move, found), _rows(move, model)
        tensor = torch.empty((rows, *move.shape[1:]), dtype=dtype or kind)
        parts = blocks(move, found, rows, dtype or kind)
        name = str(tensor.dtype).removeprefix("torch.")
        report.add(move, dtype=name, size=tensor.nbytes, padding_rows=rows - move.shape[0])
        if tensor.nbytes < BLOCK:  # as short as what torch.save writes around it
            memory(tensor)[:] = b"".join(parts)
        return slot(
            move.key,
            tensor,
            layer=move.layer,
            layers=model.num_layers,
            blocks=parts if tensor.nbytes >= BLOCK else None,
        )

    done = Progress(sum(map(cost, plan)), progress)
    # A tensor is never held, so that the memory budget of tensors has nothing to limit.
    return write_tensors(
        aside, plan, make, cost=cost, workers=workers, done=done, budget=done.total
    )


def blocks(
    move: Move, found: dict[str, Stored], rows: int, dtype: torch.dtype
) -> Iterator[memoryview]:
    """The bytes of one Megatron tensor of ``rows`` rows in ``dtype``, the padding rows zero."""
    for piece in move.pieces:
        stored = found[piece.name]
        for part in stored.blocks(piece.source_row, piece.rows):
            if stored.dtype == dtype:
                yield part
            else:
                yield memory(torch.frombuffer(part, dtype=stored.dtype).to(dtype))
    left = (rows - move.shape[0]) * prod(move.shape[1:]) * dtype.itemsize
    while left:
        zeros = memoryview(bytes(min(left, BLOCK)))
        yield zeros
        left -= len(zeros)


def _kind(move: Move, found: dict[str, Stored]) -> torch.dtype:
    """The one dtype of a tensor's parts.

    Raises:
        ValueError: they are of several.
    """
    dtypes = {found[name].dtype for name in move.sources()}
    if len(dtypes) > 1:
        raise ValueError(
            f"{' and '.join(move.sources())} have different dtypes "
            f"({', '.join(sorted(map(str, dtypes)))}), and {move.name} is one tensor."
        )
    return dtypes.pop()


def _rows(move: Move, model: ModelConfig) -> int:
    """Rows of a Megatron tensor, its vocabulary padded."""
    if move.rule.megatron in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return model.padded_vocab(1)
    return move.shape[0]


def _report(
    folder: HuggingFaceFolder,
    source: Path,
    target: Path,
    model: ModelConfig,
    left_out: dict[str, str],
) -> Report:
    report = Report("hf-to-megatron", str(source), str(target))
    report.family, report.layers = model.family, model.num_layers
    report.vocab_size, report.padded_vocab = model.vocab_size, model.padded_vocab(1)
    report.rotary_base, report.rotary_percent = model.rotary_base, model.rotary_percent
    report.tied = not model.untie_embeddings_and_output_weights
    report.left_out = left_out
    report.tokenizer_sha256 = tokenizer_sha256(source)
    if model.norm_head:
        report.head = "norm-head, raw rows"
    if folder.config.get(RECORD, {}).get("norm_head_folded"):
        report.head = "norm-head, folded"
        report.warnings.append(
            "this export was folded: its head rows have length 1 and the raw lengths are lost. "
            "The model computes the same, but training goes on with another effective step size "
            "of the head (it scales with 1 / length). Continue from the raw checkpoint instead."
        )
    for warning in report.warnings:
        logger.warning(warning)
    return report


def tokenizer_sha256(folder: Path) -> str:
    """Hash of the file that defines the tokenizer; empty when there is none."""
    for name in TOKENIZERS:
        if (folder / name).is_file():
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return ""


def _describe(
    aside: Path, folder: HuggingFaceFolder, model: ModelConfig, report: Report, files: Files
) -> None:
    small = {ASSET + asset.name: asset.read_bytes() for asset in folder.assets()}
    files = files | add_files(aside, small | documents(model, name="converted"))
    keys = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id", RECORD)
    origin: dict[str, Any] = {key: folder.config[key] for key in keys if key in folder.config}
    about = description(
        model,
        dtype=report.entries[0].dtype,
        tokenizer_sha256=report.tokenizer_sha256 or None,
        converted_from=origin,
    )
    seal(aside, about, files)

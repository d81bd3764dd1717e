"""Hugging Face folders to Megatron checkpoints and back, with a report of every tensor.

python -m tools.convert hf-to-megatron HF_DIR CKPT
python -m tools.convert megatron-to-hf CKPT HF_DIR [--fold-norm-head] [--tokenizer FILE]
python -m tools.convert verify HF_DIR CKPT [--text FILE]
python -m tools.convert inspect CKPT
python -m tools.convert diff CKPT CKPT

Both directions end by comparing logits in fp32 on the CPU when the model fits in memory
(--no-verify leaves that out), and leave nothing behind when anything fails. The report goes to
standard output and, as JSON, beside the output. Exit codes: 0 done, 2 refused, 1 failed or differs.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cli import refusing

if TYPE_CHECKING:
    from megatron_ext.convert.report import Report

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand."""
    args = _parser().parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # comparisons are in fp32 on the CPU
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    to_megatron = commands.add_parser("hf-to-megatron", help="import a model folder")
    to_megatron.add_argument("source", type=Path, help="holds config.json and weights")
    to_megatron.add_argument("target", type=Path, help="checkpoint folder; must not exist yet")
    to_megatron.set_defaults(run=_to_megatron)
    to_hf = commands.add_parser("megatron-to-hf", help="export a checkpoint")
    to_hf.add_argument("source", type=Path, help="checkpoint of any layout, or a run folder")
    to_hf.add_argument("target", type=Path, help="model folder; must not exist yet")
    to_hf.add_argument(
        "--fold-norm-head", action="store_true", help="normalise the head's rows: a plain Llama"
    )
    to_hf.add_argument("--shard-size", type=_size, default="5GB", help="of a file (default 5GB)")
    to_hf.add_argument("--tokenizer", type=Path, help="tokenizer file or folder to put beside")
    to_hf.set_defaults(run=_to_huggingface)
    for command in (to_megatron, to_hf):
        command.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as stored)")
        command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
        command.add_argument("--no-verify", action="store_true", help="do not compare logits")
        command.add_argument("--report", type=Path, help="JSON file (default TARGET.report.json)")
    verify = commands.add_parser("verify", help="compare logits, layer by layer")
    verify.add_argument("huggingface", type=Path)
    verify.add_argument("checkpoint", type=Path)
    verify.set_defaults(run=_verify)
    for command in (to_megatron, to_hf, verify):
        command.add_argument("--text", type=Path, action="append", default=[], help="UTF-8 file")
        command.add_argument("--tokens", type=int, default=256, help="longest text (default 256)")
    inspect = commands.add_parser("inspect", help="say what a checkpoint is")
    inspect.add_argument("checkpoint", type=Path)
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=_inspect)
    diff = commands.add_parser("diff", help="compare two checkpoints tensor by tensor")
    diff.add_argument("first", type=Path)
    diff.add_argument("second", type=Path)
    diff.set_defaults(run=_diff)
    return parser


def _size(text: str) -> int:
    for unit, factor in UNITS.items():
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * factor)
    return int(text)


@contextmanager
def _bar(what: str) -> Iterator[Any]:
    """A progress bar in bytes; silent where no person looks."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _to_megatron(args: argparse.Namespace) -> int:
    from megatron_ext.convert.to_megatron import to_megatron

    with _bar("converting") as progress:
        report = to_megatron(
            args.source,
            args.target,
            workers=args.workers,
            dtype=_dtype(args.dtype),
            progress=progress,
        )
    return _conclude(args, report, huggingface=args.source, checkpoint=args.target)


def _to_huggingface(args: argparse.Namespace) -> int:
    from megatron_ext.checkpoint.folder import checkpoint_of
    from megatron_ext.convert.to_huggingface import to_huggingface

    args.source = checkpoint_of(args.source)
    with _bar("converting") as progress:
        report = to_huggingface(
            args.source,
            args.target,
            workers=args.workers,
            dtype=_dtype(args.dtype),
            fold_norm_head=args.fold_norm_head,
            shard_bytes=args.shard_size,
            tokenizer=args.tokenizer,
            progress=progress,
        )
    return _conclude(args, report, huggingface=args.target, checkpoint=args.source)


def _dtype(word: str | None) -> Any:
    import torch

    return getattr(torch, DTYPES[word]) if word else None


def _conclude(
    args: argparse.Namespace, report: "Report", *, huggingface: Path, checkpoint: Path
) -> int:
    """Print the report, compare logits, and take the output back if they differ."""
    from megatron_ext.atomic import write_text

    print(report.as_text())
    agrees = True
    refusal = "--no-verify" if args.no_verify else _too_large(report.parameters)
    if refusal:
        print(f"  logits not compared: {refusal}")
    else:
        found = _compare(huggingface, checkpoint, args)
        agrees = all(parity.agrees for parity in found)
        report.verification = {parity.name: parity.as_dict() for parity in found}
    if not agrees:
        shutil.rmtree(args.target)
        print(f"failed: the logits differ, and {args.target} was removed", file=sys.stderr)
        return 1
    path = args.report or args.target.with_name(args.target.name + ".report.json")
    write_text(path, report.as_json())
    print(f"  report: {path}")
    return 0


def _too_large(parameters: int) -> str:
    """Why a model cannot be compared in fp32 on this machine; empty when it can."""
    import psutil

    needed = int(parameters * 4 * 1.3) + (2 << 30)  # one model at a time, and room for activations
    free = psutil.virtual_memory().available
    if needed <= free:
        return ""
    return f"fp32 needs about {needed / 2**30:.0f} GiB and {free / 2**30:.0f} GiB are free"


def _compare(huggingface: Path, checkpoint: Path, args: argparse.Namespace) -> list[Any]:
    from megatron_ext.convert.described import model_of
    from megatron_ext.evaluate.parity import verify
    from megatron_ext.evaluate.passages import token_ids

    model, _ = model_of(checkpoint)
    tokens = min(args.tokens, model.max_position_embeddings)
    texts, how = token_ids(huggingface, args.text, vocab_size=model.vocab_size, tokens=tokens)
    print(f"  comparing logits in fp32 on the CPU ({how})")
    found = verify(huggingface, checkpoint, texts)
    for parity in found:
        print(parity.as_text())
    return found


def _verify(args: argparse.Namespace) -> int:
    found = _compare(args.huggingface, args.checkpoint, args)
    return 0 if all(parity.agrees for parity in found) else 1


def _inspect(args: argparse.Namespace) -> int:
    import json

    from megatron_ext.convert.inspection import as_text, inspect

    found = inspect(args.checkpoint)
    print(json.dumps(found, indent=1) if args.json else as_text(found))
    return 0


def _diff(args: argparse.Namespace) -> int:
    from megatron_ext.convert.difference import compare

    with _bar("comparing") as progress:
        found = list(compare(args.first, args.second, progress=progress))
    different = [one for one in found if one.verdict != "equal"]
    for one in different:
        where = "" if one.layer is None else f" layer {one.layer}"
        size = f", largest {one.largest:.3e}" if one.largest else ""
        print(f"{one.key}{where}: {one.verdict}{size}")
    print(f"{len(found) - len(different)} tensors equal, {len(different)} not")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(refusing(main))

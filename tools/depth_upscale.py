"""A deeper model out of a trained one: layers of a checkpoint copied by a map.

python -m tools.depth_upscale CKPT OUT --copy 12:28              Yi-9B: 32 layers to 48
python -m tools.depth_upscale CKPT OUT --map 0:24,8:32           SOLAR: 32 layers to 48
python -m tools.depth_upscale CKPT OUT --insert-identity every=4   LLaMA-Pro: the same function
python -m tools.depth_upscale CKPT OUT --auto 16 --text FILE     the block that changes least

Works on checkpoints of any layout, one tensor at a time. Reports the loss before and after on
--text. Train on with checkpoint.load=OUT and model.num_layers as reported, at any layout. Exit
codes: 0 done, 2 refused, 1 failed.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from launch.cli import refusing
from megatron_ext.surgery.layer_map import (
    NewLayer,
    copy_blocks,
    insert_identities,
    join_ranges,
    parse_ranges,
    spell,
)

MOMENTS = ("copy", "zero", "drop")


def main(argv: list[str] | None = None) -> int:
    """Choose the map, write the checkpoint, measure it."""
    args = _parser().parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # measured in fp32 on the CPU
    from megatron_ext.convert.described import model_of

    model, _ = model_of(args.source)
    if args.auto is not None and not 1 <= args.auto <= model.num_layers:
        raise ValueError(f"--auto {args.auto} is not from 1 to the {model.num_layers} layers.")
    measured: dict[str, Any] = {}
    if args.auto is not None or not args.no_loss:
        measured = _measure(args.source, args)
    layers = _layers(args, model.num_layers, measured)
    parents = [new.parent for new in layers]
    print(f"{model.num_layers} layers to {len(layers)}: {spell(parents)}")
    _write(args, layers)
    report = {"source": str(args.source), "target": str(args.target), "layer_map": parents}
    report |= {"identity_layers": [i for i, new in enumerate(layers) if new.identity]}
    report |= {"moments": args.moments, "cosines": measured.get("cosines")}
    if not args.no_loss:
        report |= {
            "loss_before": measured["losses"],
            "loss_after": _measure(args.target, args)["losses"],
        }
        for name, before in measured["losses"].items():
            print(f"  loss on {name}: {before:.4f} before, {report['loss_after'][name]:.4f} after")
    from megatron_ext.atomic import write_text

    path = args.target.with_name(args.target.name + ".report.json")
    write_text(path, json.dumps(report, indent=1) + "\n")
    print(
        f"  report: {path}\n  train on with checkpoint.load={args.target} "
        f"model.num_layers={len(layers)}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.depth_upscale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="checkpoint folder, saved at any layout")
    parser.add_argument("target", type=Path, help="checkpoint folder; must not exist yet")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--copy", metavar="A:B", help="put layers A to B-1 once more behind B-1")
    how.add_argument("--map", metavar="A:B,C:D", help="ranges one behind the other")
    how.add_argument("--insert-identity", metavar="every=N", help="a silent copy each N layers")
    how.add_argument("--auto", type=int, metavar="N", help="copy the N layers that change least")
    parser.add_argument(
        "--moments", choices=MOMENTS, default="zero", help="of Adam, for copies (default zero)"
    )
    parser.add_argument("--text", type=Path, action="append", default=[], help="UTF-8 file")
    parser.add_argument("--tokens", type=int, default=512, help="longest text (default 512)")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json or .model")
    parser.add_argument("--no-loss", action="store_true", help="do not measure")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    return parser


def _layers(args: argparse.Namespace, num_layers: int, measured: dict[str, Any]) -> list[NewLayer]:
    if args.copy:
        return copy_blocks(num_layers, parse_ranges(args.copy))
    if args.map:
        return join_ranges(num_layers, parse_ranges(args.map))
    if args.insert_identity:
        word, _, number = args.insert_identity.partition("=")
        if word != "every" or not number.isdigit():
            raise ValueError(f"--insert-identity {args.insert_identity}: write it as every=4.")
        return insert_identities(num_layers, int(number))
    from megatron_ext.evaluate.layer_cosine import as_text, draw, nearest_block

    block = nearest_block(measured["cosines"], args.auto)
    picture = args.target.with_name(args.target.name + ".cosine.png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(measured["cosines"], block, picture)
    print(as_text(measured["cosines"], block))
    print(f"block {block[0]}:{block[1]} changes the stream least; picture: {picture}")
    return copy_blocks(num_layers, [block])


def _write(args: argparse.Namespace, layers: list[NewLayer]) -> None:
    from tqdm import tqdm

    from megatron_ext.surgery.upscale import upscale

    with tqdm(desc="writing", unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        upscale(
            args.source,
            args.target,
            layers,
            moments=args.moments,
            workers=args.workers,
            progress=progress,
        )


def _measure(checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Loss on each text, and each layer's cosine over all of them."""
    from megatron_ext.convert.described import carried_tokenizer, model_of
    from megatron_ext.evaluate import alone
    from megatron_ext.evaluate.layer_cosine import layer_cosines
    from megatron_ext.evaluate.passages import token_ids

    model, _ = model_of(checkpoint)
    with carried_tokenizer(checkpoint, args.tokenizer) as folder:
        tokens = min(args.tokens, model.max_position_embeddings)
        texts, how = token_ids(folder, args.text, vocab_size=model.vocab_size, tokens=tokens)
    texts.pop("random")
    print(f"measuring {checkpoint} in fp32 on the CPU ({how})")
    with alone.loaded(checkpoint) as net:
        losses = {n: alone.mean_loss(alone.logits(net, ids), ids) for n, ids in texts.items()}
        return {"losses": losses, "cosines": layer_cosines(net, list(texts.values()))}


if __name__ == "__main__":
    sys.exit(refusing(main))

"""Loss by position in long documents: a checkpoint as trained and with its positions stretched.

    python -m tools.loss_by_position CKPT --data .cache/quickstart/validation/en-books \\
        --length 4096 --rope as_trained linear=8 dynamic=8 --beside "trained on=OTHER_CKPT"

Every --rope is tried on CKPT; a --beside checkpoint is measured as trained, on the same tokens.
Prints a table, and writes loss_by_position.json and .png.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cli import refusing

if TYPE_CHECKING:
    import numpy as np

    from megatron_ext.evaluate.loss_by_position import Setting


@dataclass(kw_only=True)
class Curve:
    """One checkpoint under one setting."""

    name: str
    checkpoint: str
    rotary_base: float
    loss: list[float]
    """Mean nats per token of each bin, over all windows."""

    beyond: float
    """The same over all bins past the trained length."""

    more: float = 0.0
    """``beyond`` less that of the last curve, and ..."""

    standard_error: float = 0.0
    """... the standard error of that difference, taken window by window."""


def main(argv: list[str] | None = None) -> int:
    """Score, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.loss_by_position",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="of any layout")
    parser.add_argument("--data", nargs="+", required=True, metavar="PREFIX", help=".bin/.idx")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a window")
    parser.add_argument("--bins", type=int, default=8, help="equal runs of positions")
    parser.add_argument("--trained", type=int, help="length CKPT was trained at; default: it says")
    parser.add_argument("--rope", nargs="+", default=["as_trained"], metavar="METHOD[=FACTOR]")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=CKPT")
    parser.add_argument("--most", type=int, default=64, help="windows of each corpus")
    parser.add_argument("--out", type=Path, default=Path("runs/loss_by_position"))
    args = parser.parse_args(argv)
    for key in ("length", "bins", "most"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key}={getattr(args, key)} must be at least 1.")
    if args.length % args.bins:
        raise ValueError(f"--length={args.length} is not a multiple of --bins={args.bins}.")
    beside = [_named(text) for text in args.beside]

    from megatron_ext.checkpoint.parent import trained_length
    from megatron_ext.evaluate.loss_by_position import Setting, windows

    settings = [Setting.read(word) for word in args.rope]
    trained = args.trained or trained_length(args.checkpoint)
    if not 0 < trained < args.length:
        raise ValueError(
            f"--trained={trained} must lie below --length={args.length}: only positions past the "
            f"trained length say how far a model reaches."
        )
    pieces = {n: found[: args.most] for n, found in windows(args.data, args.length).items()}
    every = [piece for found in pieces.values() for piece in found]
    scored = _score(args.checkpoint, "", settings, every, trained=trained, bins=args.bins)
    for name, path in beside:
        scored += _score(path, name, [Setting()], every, trained=trained, bins=args.bins)
    curves = compare(scored, trained=trained, length=args.length)

    counts = {name: len(found) for name, found in pieces.items()}
    print(table(curves, trained=trained, length=args.length))
    print("windows: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"length": args.length, "trained": trained, "windows": counts}
    _write(args.out / "loss_by_position.json", report | {"curves": [asdict(c) for c in curves]})
    draw(curves, args.out / "loss_by_position.png", trained=trained, length=args.length)
    print(args.out / "loss_by_position.png")
    return 0


def _named(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise ValueError(f"--beside {text}: write NAME=CKPT.")
    return name, Path(path)


def _write(path: Path, report: dict[str, Any]) -> None:
    from megatron_ext import atomic

    atomic.write_text(path, json.dumps(report, indent=1) + "\n")


def _score(
    path: Path,
    name: str,
    settings: "list[Setting]",
    every: "list[np.ndarray]",
    *,
    trained: int,
    bins: int,
) -> "list[tuple[Curve, np.ndarray]]":
    """A curve and its losses by window and bin [K, B] for each setting of one checkpoint."""
    from megatron_ext.convert.described import model_of
    from megatron_ext.evaluate import alone
    from megatron_ext.evaluate.loss_by_position import score

    shape = model_of(path)[0]
    base = shape.rotary_base
    largest = max(int(piece.max()) for piece in every)
    alone.check_ids(path, shape, largest, what="--data")
    found = []
    with alone.loaded(path) as model:
        for one in settings:
            losses = score(model, every, one, base=base, trained=trained, bins=bins)
            curve = Curve(
                name=name or one.name,
                checkpoint=str(path),
                rotary_base=base,
                loss=losses.mean(0).tolist(),
                beyond=math.nan,
            )
            found.append((curve, losses))
    return found


def compare(scored: "list[tuple[Curve, np.ndarray]]", *, trained: int, length: int) -> list[Curve]:
    """The curves with their means past ``trained``, each held against the last."""
    bins = scored[0][1].shape[1]
    first = -(-trained * bins // length)
    if first >= bins:
        raise ValueError(
            f"--trained={trained} lies in the last of --bins={bins} bins of {length // bins} "
            f"tokens: nothing is past it; give more --bins or a longer --length."
        )
    last = scored[-1][1][:, first:].mean(1)
    for curve, losses in scored:
        mean = losses[:, first:].mean(1)
        more = mean - last
        curve.beyond, curve.more = float(mean.mean()), float(more.mean())
        if len(more) > 1:
            curve.standard_error = float(more.std(ddof=1) / math.sqrt(len(more)))
    return [curve for curve, _ in scored]


def table(curves: list[Curve], *, trained: int, length: int) -> str:
    """Bins as rows, curves as columns, then what lies past the trained length."""
    bins = len(curves[0].loss)
    width = length // bins
    rows = [["positions", *(c.name for c in curves)]]
    for number in range(bins):
        where = f"{number * width}-{(number + 1) * width - 1}"
        rows.append([where, *(f"{c.loss[number]:.3f}" for c in curves)])
    rows.append([f"past {trained}", *(f"{c.beyond:.3f}" for c in curves)])
    rows.append(["over the last", *(f"{c.more:+.3f}" for c in curves)])
    rows.append(["standard error", *(f"{c.standard_error:.3f}" for c in curves)])
    sizes = [max(map(len, column)) for column in zip(*rows)]
    lines = [[row[0].ljust(sizes[0]), *(c.rjust(n) for c, n in zip(row[1:], sizes[1:]))]
             for row in rows]  # fmt: skip
    return "\n".join("  ".join(line) for line in lines)


def draw(curves: list[Curve], out: Path, *, trained: int, length: int) -> None:
    """Loss over position, the trained length marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    bins = len(curves[0].loss)
    middles = [(number + 0.5) * length / bins for number in range(bins)]
    for curve in curves:
        axes.plot(middles, curve.loss, marker="o", markersize=3, label=curve.name)
    axes.axvline(trained, linestyle=":", color="black", linewidth=1)
    axes.annotate(f"trained at {trained}", (trained, 0.98), xycoords=("data", "axes fraction"),
                  rotation=90, va="top", ha="right", fontsize=8)  # fmt: skip
    axes.set(xlabel="position in the document's window", ylabel="loss (nats per token)")
    axes.set_xlim(0, length)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(refusing(main))

"""Draw a run: loss per domain, learning rate and gradient norm over tokens, phases as bands.

python -m tools.plot RUN_DIR [--out picture.png]
python -m tools.plot RUN_DIR RUN_DIR ...     several runs side by side, named by what differs
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from launch.cli import check_picture, refusing

BANDS = ("#eef3fa", "#fdf1e3", "#edf7ed", "#f7edf5")


def main(argv: list[str] | None = None) -> int:
    """Read metrics.jsonl and config.yaml of each run, write one PNG."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="default: in the first RUN_DIR")
    parser.add_argument(
        "--level", type=float, action="append", default=[], help="a loss to draw as a dotted line"
    )
    args = parser.parse_args(argv)
    first, *others = args.run_dirs
    out = args.out or first / ("side_by_side.png" if others else "curves.png")
    check_picture(out)
    if others:
        beside(args.run_dirs, out)
    else:
        draw(first, out, levels=args.level)
    print(out)
    return 0


def beside(run_dirs: list[Path], out: Path) -> None:
    """One picture of several runs.

    Raises:
        FileNotFoundError: a folder holds no metrics.
    """
    from tools import curves

    metrics = [_metrics(run_dir) for run_dir in run_dirs]
    runs: dict[str, list[curves.Records]] = {}
    for label, records in zip(curves.labels(run_dirs), metrics, strict=True):
        runs.setdefault(label, []).append(records)
    curves.draw(runs, out, title=", ".join(run_dir.name for run_dir in run_dirs))


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    from megatron_ext.train.read_metrics import read

    if not (run_dir / "metrics.jsonl").exists():
        raise FileNotFoundError(f"{run_dir} holds no metrics.jsonl: has this run taken a step?")
    return read(run_dir / "metrics.jsonl")


def draw(run_dir: Path, out: Path, *, levels: list[float]) -> None:
    """The picture of one run, from the files it left.

    Raises:
        FileNotFoundError: the folder holds no metrics.
    """
    from launch.compose import load
    from megatron_ext.train.phases import Plan

    records = _metrics(run_dir)
    plan = Plan.of(load(run_dir / "config.yaml"))

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, rate, grad) = plt.subplots(
        3, 1, figsize=(11, 11), sharex=True, height_ratios=[3, 1, 1], layout="constrained"
    )
    _loss(loss, records, levels)
    _line(rate, records, "lr", "learning rate")
    _line(grad, records, "grad_norm", "gradient norm")
    for axis in (loss, rate, grad):
        _bands(axis, plan)
    grad.set_xlabel("tokens")
    loss.set_title(f"{run_dir.name}: {plan.tokens:,} tokens in {plan.steps} steps")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _loss(axis: Any, records: list[dict[str, Any]], levels: list[float]) -> None:
    steps = [r for r in records if "loss" in r]
    axis.plot(
        [r["tokens"] for r in steps],
        [r["loss"] for r in steps],
        color="0.7",
        linewidth=0.8,
        label="training",
    )
    scored = [r for r in records if "validation" in r]
    for domain in sorted({d for r in scored for d in r["validation"]}):
        points = [
            (r["tokens"], r["validation"][domain]) for r in scored if domain in r["validation"]
        ]
        axis.plot(*zip(*points, strict=True), marker=".", linewidth=1.2, label=domain)
    for level in levels:
        axis.axhline(level, linestyle=":", color="black", linewidth=1)
        axis.annotate(f"{level:.2f}", (0, level), fontsize=8, va="bottom")
    axis.set_ylabel("loss (nats per token)")
    axis.legend(fontsize=8, ncols=3)
    axis.grid(alpha=0.3)


def _line(axis: Any, records: list[dict[str, Any]], key: str, label: str) -> None:
    steps = [r for r in records if key in r]
    axis.plot([r["tokens"] for r in steps], [r[key] for r in steps], linewidth=1)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def _bands(axis: Any, plan: Any) -> None:
    for phase in plan.phases:
        end = phase.start_tokens + phase.tokens
        axis.axvspan(
            phase.start_tokens, end, color=BANDS[phase.index % len(BANDS)], zorder=0, linewidth=0
        )
        axis.annotate(
            phase.name,
            (phase.start_tokens, 1),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            va="top",
            xytext=(3, -3),
            textcoords="offset points",
        )


if __name__ == "__main__":
    sys.exit(refusing(main))

"""Shows a run over time before it starts: a table of its phases, and a picture of them.

    python -m tools.timeline recipe=skywork_13b/stage2
    python -m tools.timeline --config RUN_DIR/config.yaml --out phases.png

The picture draws learning rate, mixture, batch, sequence length and RoPE base over tokens.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cli import check_picture, refusing

if TYPE_CHECKING:
    from megatron_ext.config import RunConfig
    from megatron_ext.train.phases import Phase, Plan

POINTS = 400  # per phase: a warmup of half a percent still shows
BANDS = ("#eef3fa", "#fdf1e3", "#edf7ed", "#f7edf5")


def main(argv: list[str] | None = None) -> int:
    """Print the table, write the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.timeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="GROUP=CHOICE or dotted.key=VALUE")
    parser.add_argument("--config", type=Path, help="a saved config.yaml instead of a recipe")
    parser.add_argument("--out", type=Path, help="the picture; default: NAME-timeline.png")
    parser.add_argument(
        "--trained", type=int, help="sequence length before the run, for the reach of the RoPE base"
    )
    parser.add_argument("--no-picture", action="store_true", help="print the table only")
    args = parser.parse_intermixed_args(argv)
    if args.trained is not None and args.trained < 1:
        raise ValueError(f"--trained={args.trained} must be at least 1 token.")

    from launch import compose
    from megatron_ext.check import check_phases
    from megatron_ext.plan import rope_reach

    if args.config:
        run = compose.override(compose.load(args.config), args.overrides)
    else:
        run = compose.compose(args.overrides)
    out = args.out or Path(f"{run.name}-timeline.png")
    if not args.no_picture:
        check_picture(out)
    plan = check_phases(run)
    print(table(run, plan))
    for sentence in rope_reach.warnings(run, trained=args.trained):
        print(f"warning: {sentence}", file=sys.stderr)
    if not args.no_picture:
        draw(run, plan, out)
        print(out)
    return 0


def short(tokens: float) -> str:
    """A count in the unit that people say it in: ``2.59T``, ``210B``, ``40.96k``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.4g}{unit}"
    return f"{tokens:g}"


def shares(phase: "Phase", fraction: float) -> dict[str, float]:
    """The mixture at ``fraction`` of a phase."""
    config = phase.config
    start, end = config.mixture, config.mixture_end or config.mixture
    x = fraction**config.ramp_power
    names = list(dict.fromkeys([*start, *end]))
    return {n: start.get(n, 0.0) + (end.get(n, 0.0) - start.get(n, 0.0)) * x for n in names}


def rate(run: "RunConfig", phase: "Phase", fraction: float) -> float:
    """The learning rate at ``fraction`` of a phase."""
    from megatron_ext.optim.schedule import learning_rate

    tokens = round(phase.config.tokens * fraction)
    return learning_rate(run.phases, run.optimizer, phase=phase.index, phase_tokens=tokens)


def table(run: "RunConfig", plan: "Plan") -> str:
    """One row a phase, and what each mixes below it."""
    rows = [
        ["phase", "tokens", "steps", "sequences", "seq", "tokens/step", "lr", "base", "packing"]
    ]
    for phase in plan.phases:
        sizes = list(dict.fromkeys(size for _, size, _ in phase.batches()))
        grown = phase.config.batch_growth.max_global_batch_size
        rows.append(
            [
                phase.name,
                short(phase.tokens),
                f"{phase.steps:,}" + (" or fewer" if grown else ""),
                ">".join(map(str, sizes)) + (f" to {grown} on plateaus" if grown else ""),
                f"{phase.seq_length:,}",
                ">".join(short(size * phase.seq_length) for size in sizes),
                _rates(run, phase),
                f"{phase.rotary_base:g}",
                phase.config.packing
                + (", moments reset" if phase.config.optimizer_state == "reset" else ""),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    for phase, line in zip(plan.phases, range(1, len(lines))):
        lines[line] += "".join(f"\n    {text}" for text in _mixture(phase))
    lines.append(f"{short(plan.tokens)} tokens in {plan.steps:,} steps")
    return "\n".join(lines)


def _rates(run: "RunConfig", phase: "Phase") -> str:
    warmup = phase.config.schedule.warmup_tokens
    peak = rate(run, phase, min(warmup / phase.config.tokens, 1.0))
    words = f"{phase.config.schedule.name} {peak:.4g} to {rate(run, phase, 1.0):.4g}"
    return f"{words}, warmup {short(warmup)}" if warmup else words


def _mixture(phase: "Phase") -> list[str]:
    """Shares of a phase in percent, three sources a line; ``a>b`` where they ramp."""
    first, last = shares(phase, 0.0), shares(phase, 1.0)
    parts = [
        f"{name} {first[name]:.1%}" + (f">{last[name]:.1%}" if last[name] != first[name] else "")
        for name in first
    ] or ["sources in proportion to their sizes"]
    return ["  ".join(parts[i : i + 6]) for i in range(0, len(parts), 6)]


def draw(run: "RunConfig", plan: "Plan", out: Path) -> None:
    """Five panels over one axis of tokens, phases as bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        5, 1, figsize=(11, 12), sharex=True, height_ratios=[3, 3, 1, 1, 1], layout="constrained"
    )
    figure.suptitle(f"{run.name}: {short(plan.tokens)} tokens, {plan.steps:,} steps")
    fractions = [i / POINTS for i in range(POINTS + 1)]
    for phase in plan.phases:
        x = [phase.start_tokens + f * phase.config.tokens for f in fractions]
        panels[0].plot(x, [rate(run, phase, f) for f in fractions], color="#1f4e79")
        at = [round(f * phase.config.tokens) for f in fractions]
        sizes = [phase.global_batch_size(t) * phase.seq_length for t in at]
        panels[2].step(x, sizes, where="post", color="#7a4a00")
        panels[3].plot(x, [phase.seq_length] * len(x), color="#2e6b34")
        panels[4].plot(x, [phase.rotary_base] * len(x), color="#6b2e5f")
        for panel, band in zip(panels, [BANDS[phase.index % len(BANDS)]] * 5):
            panel.axvspan(x[0], x[-1], color=band, zorder=0)
        middle = phase.start_tokens + phase.config.tokens / 2
        panels[0].annotate(
            phase.name, (middle, 1.02), xycoords=("data", "axes fraction"), ha="center"
        )
    _stack(panels[1], plan, fractions)
    for panel, label in zip(
        panels, ("learning rate", "mixture", "tokens per step", "sequence length", "RoPE base")
    ):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    for panel in panels[2:]:
        panel.set_yscale("log")
    panels[0].set_ylim(bottom=0)
    panels[-1].set_xlabel("tokens")
    panels[-1].xaxis.set_major_formatter(lambda value, _: short(value))
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _stack(panel: Any, plan: "Plan", fractions: list[float]) -> None:
    """Shares of all sources, one above the other, in the same colour in every phase."""
    import matplotlib

    names = list(dict.fromkeys(n for phase in plan.phases for n in shares(phase, 0.0)))
    colours = dict(zip(names, matplotlib.colormaps["tab20"].colors))
    seen: set[str] = set()
    for phase in plan.phases:
        x = [phase.start_tokens + f * phase.config.tokens for f in fractions]
        there = list(shares(phase, 0.0))
        values = [[shares(phase, f)[n] for f in fractions] for n in there]
        if there:
            labels = [None if n in seen else n for n in there]
            panel.stackplot(
                x, values, labels=labels, colors=[colours.get(n, "#999999") for n in there]
            )
            seen.update(there)
    panel.set_ylim(0, 1)
    if seen:
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


if __name__ == "__main__":
    sys.exit(refusing(main))

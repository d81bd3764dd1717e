"""Runs one of the published ablations at proxy scale, arm by arm, and draws the curves together.

    python -m tools.ablation norm_head
    python -m tools.ablation schedule --tokens 300000 --seeds 2 --out runs/ablation

Every arm is a plain run of launch.train with the same seeds and data; an arm that has finished is
not run again. The spread over seeds says how much of a difference is noise.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cli import refusing

QUALITY = (
    "phases.1.mixture={zh-web: 0.2267, zh-curated: 0.1911, en-web: 0.2833, en-curated: 0.2389, "
    "code: 0.06}"
)
UNCHANGED = (
    "phases.1.mixture={zh-web: 0.3733, zh-curated: 0.0445, en-web: 0.4667, en-curated: 0.0555, "
    "code: 0.06}"
)
PURE = (
    "phases.1.mixture={zh-web: 0.2267, zh-curated: 0.1911, en-web: 0.2833, en-curated: 0.2389, "
    "code: 0.06, instruct: 0.0}"
)
# 36 against 9 layers in small: four times the depth at half the width, 1,769,472 weights each.
# Both widths are a 16th of the published arms', so rates and initial weights grow by sqrt(16).
SIXTEENTH = ["model.init_method_std=0.04", "optimizer.lr=8e-4", "optimizer.min_lr=2e-5"]


def _shape(layers: int, width: int) -> list[str]:
    size = {"num_layers": layers, "hidden_size": width, "num_attention_heads": width // 16}
    size["ffn_hidden_size"] = width * 8 // 3
    return [*(f"model.{key}={value}" for key, value in size.items()), *SIXTEENTH]


@dataclass(frozen=True)
class Ablation:
    """One question, its arms as overrides of one recipe, and what was published."""

    arms: dict[str, list[str]]
    published: str
    rates: bool = False
    """The arms name published rates, to be scaled as the recipe's own rate is."""


ABLATIONS = {
    "norm_head": Ablation(
        arms={
            "Norm-Head": ["model.norm_head=true"],
            "plain head": ["model.norm_head=false"],
        },
        published="S0: better with it; its gradient norm is higher and climbs less",
    ),
    "depth": Ablation(
        arms={"deep": _shape(16, 96), "shallow": _shape(4, 192)},
        published="S0: 36 layers beat 9 at equal non-embedding parameters",
    ),
    "lr": Ablation(
        arms={"2e-4": ["optimizer.lr=2e-4"], "5e-4": ["optimizer.lr=5e-4"]},
        published="S0: the larger rate is better",
        rates=True,
    ),
    "schedule": Ablation(
        arms={name: [f"phases.0.schedule.name={name}"] for name in ("cosine", "linear", "wsd")},
        published="S0: they meet at the end; WSD is higher while stable and falls fast",
    ),
    "schedule_data": Ablation(
        arms={
            f"{name}{label}": [f"phases.0.schedule.name={name}", mixture]
            for name in ("cosine", "wsd")
            for label, mixture in (("", UNCHANGED), (" + quality", QUALITY))
        },
        published="S0: wsd + quality is best, cosine + quality slightly below no change",
    ),
    "pure_boost": Ablation(
        arms={"pure": [PURE], "boost": []},
        published="S0: 7 % instructions in the decay lift MMLU by seven points",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run what has not run, print the table, write the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=list(ABLATIONS))
    parser.add_argument("overrides", nargs="*", help="dotted.key=VALUE for every arm")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="length of every arm")
    parser.add_argument("--seeds", type=int, default=1, help="runs per arm")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    args = parser.parse_intermixed_args(argv)
    if args.tokens < 1 or args.seeds < 1:
        raise ValueError(f"--tokens={args.tokens} and --seeds={args.seeds} must be at least 1.")

    ablation, folder = ABLATIONS[args.name], args.out / args.name
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for arm, overrides in ablation.arms.items():
        for seed in range(args.seeds):
            words = [f"recipe=ablation/{args.name}", "scale=proxy", f"scale.tokens={args.tokens}"]
            own = _scaled(words, overrides) if ablation.rates else overrides
            run_dir = folder / f"{arm.replace(' ', '_')}-{seed}"
            more = [f"seed={1234 + seed}", *own, *args.overrides]
            runs.setdefault(arm, []).append(_run(run_dir, [*words, *more]))
    print(table(runs))
    print(f"published: {ablation.published}")
    picture = folder / f"{args.name}.png"
    draw(args.name, runs, picture)
    print(picture)
    return 0


def _scaled(words: list[str], overrides: list[str]) -> list[str]:
    """``overrides`` with published rates multiplied as shrinking multiplied the recipe's rate."""
    from launch.compose import compose

    factor = compose(words).optimizer.lr / compose(words[:1]).optimizer.lr
    pairs = [text.split("=") for text in overrides]
    return [f"{key}={float(value) * factor}" for key, value in pairs]


def _run(run_dir: Path, words: list[str]) -> list[dict[str, Any]]:
    """The metrics of one arm, which is run if it has not finished.

    Raises:
        ValueError: the run did not finish.
    """
    from megatron_ext.resilience.outcome import read_outcome
    from megatron_ext.train.read_metrics import read

    done = read_outcome(run_dir) if run_dir.exists() else None
    if done is None or done.word != "finished":
        steps = ["logging.interval_steps=2", "evaluation.interval_steps=25"]
        words = [*words, *steps, f"run_dir={run_dir}", "checkpoint.interval_steps=1000000"]
        command = [sys.executable, "-m", "launch.train", *words]
        print(f"{run_dir}: {' '.join(command[1:])}", flush=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(run_dir / "arm.log", "ab") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            raise ValueError(f"{run_dir} ended with {code}: see {run_dir / 'arm.log'}")
    return read(run_dir / "metrics.jsonl")


def last_loss(records: list[dict[str, Any]]) -> float:
    """Mean training loss of the last tenth of the steps."""
    losses = [r["loss"] for r in records if "loss" in r]
    tail = losses[-max(len(losses) // 10, 1) :]
    return sum(tail) / len(tail)


def validation(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Unweighted mean over domains of the validation loss, by tokens."""
    scored = [r for r in records if "validation" in r]
    return [(r["tokens"], sum(r["validation"].values()) / len(r["validation"])) for r in scored]


def table(runs: dict[str, list[list[dict[str, Any]]]]) -> str:
    """One line an arm: final losses (mean over seeds, and their range), every domain."""
    lines = []
    for arm, seeds in runs.items():
        finals = [validation(records)[-1][1] for records in seeds]
        train = sum(map(last_loss, seeds)) / len(seeds)
        spread = f" (range {max(finals) - min(finals):.4f})" if len(finals) > 1 else ""
        mean = sum(finals) / len(finals)
        lines.append(f"{arm:18s} validation {mean:.4f}{spread}  train, last tenth {train:.4f}")
        last = [[r for r in records if "validation" in r][-1]["validation"] for records in seeds]
        domains = {d: sum(v[d] for v in last) / len(last) for d in sorted(last[0])}
        lines.append("    " + "  ".join(f"{d} {loss:.3f}" for d, loss in domains.items()))
    return "\n".join(lines)


def draw(name: str, runs: dict[str, list[list[dict[str, Any]]]], out: Path) -> None:
    """Training loss (running mean), mean validation loss and gradient norm over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(3, 1, figsize=(10, 12), sharex=True, layout="constrained")
    for arm, colour in zip(runs, matplotlib.colormaps["tab10"].colors):
        for number, records in enumerate(runs[arm]):
            style = {"color": colour, "linewidth": 1.2, "alpha": 1.0 if number == 0 else 0.5}
            steps = [r for r in records if "loss" in r]
            tokens, label = [r["tokens"] for r in steps], arm if number == 0 else None
            panels[0].plot(tokens, running([r["loss"] for r in steps]), label=label, **style)
            panels[1].plot(*zip(*validation(records)), marker=".", **style)
            panels[2].plot(tokens, running([r["grad_norm"] for r in steps]), **style)
    labels = ("training loss", "validation loss, mean of domains", "gradient norm")
    for panel, label in zip(panels, labels):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[0].legend()
    panels[0].set_title(f"{name}: published: {ABLATIONS[name].published}", fontsize=10)
    panels[2].set_yscale("log")
    panels[2].set_xlabel("tokens")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def running(values: list[float], span: int = 10) -> list[float]:
    """Mean of the last ``span`` values at each place."""
    windows = [values[max(i - span + 1, 0) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


if __name__ == "__main__":
    sys.exit(refusing(main))

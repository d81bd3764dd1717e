"""Runs one of the published ablations at proxy scale, arm by arm, and draws the curves together.

    python -m tools.ablation norm_head
    python -m tools.ablation schedule --tokens 300000 --seeds 2 --out runs/ablation

Every arm is a plain run of launch.train with the same seeds and data; an arm that has finished is
not run again. The spread over seeds says how much of a difference is noise.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.cli import refusing
from tools import curves
from tools.run_once import run_once

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
# 36 against 9 layers in small: four times the depth at half the width, 331,776 weights each. Depths
# are a third and widths a 32nd of our full-size arms': rates and initial weights grow by sqrt(32).
SMALL = ["model.init_method_std=0.0566", "optimizer.lr=1.131e-3", "optimizer.min_lr=2.83e-5"]
# The domains that every arm reads from its first phase on: the mean loss is over these.
GENERAL = ("zh-gov", "zh-reference", "en-web", "en-encyclopaedia", "code")


def _shape(layers: int, width: int) -> list[str]:
    size = {"num_layers": layers, "hidden_size": width, "num_attention_heads": width // 16}
    size["ffn_hidden_size"] = width * 8 // 3
    return [*(f"model.{key}={value}" for key, value in size.items()), *SMALL]


@dataclass(frozen=True)
class Ablation:
    """One question, its arms as overrides of one recipe, and what was published."""

    arms: dict[str, list[str]]
    published: str
    recipe: str = ""
    """Below conf/recipe/ablation; empty takes the ablation's own name."""

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
        arms={"deep": _shape(12, 48), "shallow": _shape(3, 96)},
        published="S0: 36 layers beat 9 at equal non-embedding parameters",
    ),
    "lr": Ablation(
        arms={"2e-4": ["optimizer.lr=2e-4"], "5e-4": ["optimizer.lr=5e-4"]},
        published="S0: the larger rate is better",
        rates=True,
    ),
    "schedule": Ablation(
        # On the recipe of schedule_data, so that arms of both can be compared.
        recipe="schedule_data",
        arms={
            name: [f"phases.0.schedule.name={name}", UNCHANGED]
            for name in ("cosine", "linear", "wsd")
        },
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
    parser.add_argument("--tokens", type=int, default=300_000, help="length of every arm")
    parser.add_argument("--seeds", type=int, default=1, help="runs per arm")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    args = parser.parse_intermixed_args(argv)
    if args.tokens < 1 or args.seeds < 1:
        raise ValueError(f"--tokens={args.tokens} and --seeds={args.seeds} must be at least 1.")

    from megatron_ext.train.read_metrics import read

    ablation, folder = ABLATIONS[args.name], args.out / args.name
    runs: dict[str, list[curves.Records]] = {}
    for arm in ablation.arms:
        for seed in range(args.seeds):
            run_dir = folder / f"{arm.replace(' ', '_')}-{seed}"
            words = words_of(args.name, arm, tokens=args.tokens)
            more = [f"seed={1234 + seed}", *args.overrides]
            run_once(run_dir, [*words, *more], log=run_dir / "arm.log")
            runs.setdefault(arm, []).append(read(run_dir / "metrics.jsonl"))
    print(table(runs))
    print(f"published: {ablation.published}")
    picture = folder / f"{args.name}.png"
    title = f"{args.name}; published: {ablation.published}"
    curves.draw(runs, picture, title=title, domains=GENERAL)
    print(picture)
    return 0


def words_of(name: str, arm: str, *, tokens: int) -> list[str]:
    """The words that launch.train is given for one arm.

    The published warmup is unknown. The recipes' own, 0.4 % of the run, is less than one step of
    so short a run, so 5 % are given.
    """
    ablation = ABLATIONS[name]
    recipe = f"recipe=ablation/{ablation.recipe or name}"
    shared = [recipe, "scale=ablation", f"scale.tokens={tokens}"]
    own = ablation.arms[arm]
    if ablation.rates:
        own = _scaled(shared, own)
    return [
        *shared,
        *own,
        f"phases.0.schedule.warmup_tokens={tokens // 20}",
        "logging.interval_steps=2",
        "logging.progress_interval_steps=10",
        "evaluation.interval_steps=25",
        "checkpoint.interval_steps=1000000",
    ]


def _scaled(words: list[str], overrides: list[str]) -> list[str]:
    """``overrides`` with published rates multiplied as shrinking multiplied the recipe's rate."""
    from launch.compose import compose

    factor = compose(words).optimizer.lr / compose(words[:1]).optimizer.lr
    pairs = [text.split("=") for text in overrides]
    return [f"{key}={float(value) * factor}" for key, value in pairs]


def table(runs: dict[str, list[curves.Records]]) -> str:
    """Markdown, one row an arm: means over seeds at the end, and the range of the first column."""
    domains = sorted(_final(next(iter(runs.values()))[0]))
    heads = ["arm", "mean of 5", *domains, "training", "gradient norm", "head's share"]
    rows = [heads, ["---"] * len(heads)]
    for arm, seeds in runs.items():
        means = [curves.validation(records, GENERAL)[-1][1] for records in seeds]
        spread = f" (range {max(means) - min(means):.3f})" if len(means) > 1 else ""
        early, late = (_mean(_tenth(r, "grad_norm", n) for r in seeds) for n in (1, 9))
        rows.append(
            [
                arm,
                f"{_mean(means):.3f}{spread}",
                *(f"{_mean(_final(records)[d] for records in seeds):.3f}" for d in domains),
                f"{_mean(_tenth(records, 'loss', 9) for records in seeds):.3f}",
                f"{early:.2f} to {late:.2f}",
                f"{_mean(map(_head_share, seeds)):.0%}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _final(records: curves.Records) -> dict[str, float]:
    """The last validation losses by domain."""
    last: dict[str, float] = [r for r in records if "validation" in r][-1]["validation"]
    return last


def _tenth(records: curves.Records, key: str, number: int) -> float:
    """Mean of ``key`` over tenth ``number`` (0 to 9) of the logged steps."""
    values = [r[key] for r in records if key in r]
    size = max(len(values) // 10, 1)
    return _mean(values[number * size :] if number == 9 else values[number * size :][:size])


def _head_share(records: curves.Records) -> float:
    """The head's share of the squared gradient norm, mean over the run."""
    return _mean(r["gradient_share"]["head"] for r in records if "gradient_share" in r)


if __name__ == "__main__":
    sys.exit(refusing(main))

"""Index-32K in small: trained at 512, continued at 4096 with a larger base, loss by position.

    python -m tools.long_context
    python -m tools.long_context --tokens 4000000 --more 4000000 --out runs/long_context

Three runs of launch.train on the corpus of `make quickstart`: `short`, Index-1.9B's recipe at 512;
from its weights `long`, the 32K recipe at 4096; and `control`, the same text and steps at 512 with
the old base. Then tools.loss_by_position stretches the positions of `short`, as it was before, and
of `control`, and holds `long` against each, on documents that none of them saw. A run that has
finished is not run again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from launch.cli import refusing
from tools.run_once import run_once

CORPUS = ".cache/quickstart"
LONG_TEXT = {"en-books": 0.5, "zh-gov": 0.2, "zh-legal": 0.1, "zh-literature": 0.2}
"""Corpora with long documents, and their shares. The recipe's one source is the first of them."""

ROPE = ["as_trained", "linear=8", "dynamic=1", "dynamic=8"]
SIZE = ["scale=long_context", "model.num_attention_heads=3", "launch.threads_per_rank=1"]
"""Three heads of 32 channels, so that 16 pairs rotate; 2.2M parameters with the vocabulary."""

QUIET = ["checkpoint.interval_steps=1000000", "logging.progress_interval_steps=10"]


def short(tokens: int) -> list[str]:
    """Index-1.9B, stable and decay, at 512."""
    warmup = f"phases.0.schedule.warmup_tokens={tokens // 16}"  # as published it would be a step
    return ["recipe=index_1p9b/pretrain", *SIZE, *QUIET, f"scale.tokens={tokens}", warmup]


def further(tokens: int, parent: Path, *, long: bool) -> list[str]:
    """Index-32K's recipe from ``parent``: as it is, or as a control at the old length and base.

    The published rate, 1e-5, is for thousands of steps: here half of the pretraining's. 640,000 is
    the base that carries 4096 tokens after 512 with 16 pairs (megatron_ext/plan/rope_reach.py).
    """
    names = dict(zip(LONG_TEXT, ("long-text", *list(LONG_TEXT)[1:])))
    sources = ", ".join(f"{names[c]}: {{path: {CORPUS}/train/{c}}}" for c in LONG_TEXT)
    shares = ", ".join(f"{names[c]}: {share}" for c, share in LONG_TEXT.items())
    words = ["recipe=index_1p9b_32k/long_pt", *SIZE, *QUIET, f"scale.tokens={tokens}"]
    words += [f"data.sources={{{sources}}}", f"phases.0.mixture={{{shares}}}"]
    words += ["optimizer.lr=1e-3", "optimizer.min_lr=1e-4", f"checkpoint.load={parent}"]
    if long:
        return [*words, "phases.0.rotary_base=640000"]
    batch = "batch={seq_length: 512, global_batch_size: 8, micro_batch_size: 8}"
    return [*words, "phases.0.rotary_base=10000", batch]


def main(argv: list[str] | None = None) -> int:
    """Train what is not trained yet, then measure."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.long_context",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="dotted.key=VALUE for every run")
    parser.add_argument("--tokens", type=int, default=1_600_000, help="at 512")
    parser.add_argument("--more", type=int, default=1_600_000, help="then at 4096, and at 512")
    parser.add_argument("--most", type=int, default=32, help="windows of each held-out corpus")
    parser.add_argument("--out", type=Path, default=Path("runs/long_context"))
    args = parser.parse_intermixed_args(argv)
    if min(args.tokens, args.more, args.most) < 1:
        raise ValueError("--tokens, --more and --most must be at least 1.")
    first = _trained(args.out / "short", [*short(args.tokens), *args.overrides])
    control, long = (
        _trained(args.out / name, [*further(args.more, first, long=it), *args.overrides])
        for name, it in (("control", False), ("long", True))
    )
    for name, stretched in (("before", first), ("control", control)):
        words = [str(stretched), "--out", str(args.out / f"beside_{name}"), "--rope", *ROPE]
        words += ["--most", str(args.most), "--beside", f"long={long}", "--data"]
        words += [f"{CORPUS}/validation/{corpus}" for corpus in LONG_TEXT]
        print(f"\n{name}, and long:", flush=True)
        command = [sys.executable, "-m", "tools.loss_by_position", *words]
        if code := subprocess.run(command).returncode:
            return code
    return 0


def _trained(run_dir: Path, words: list[str]) -> Path:
    """The last checkpoint of a run, which is started or resumed if it has not finished."""
    from megatron_ext.checkpoint.folder import candidates

    run_once(run_dir, words)
    return next(candidates(run_dir / "checkpoints"))


if __name__ == "__main__":
    sys.exit(refusing(main))

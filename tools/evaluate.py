"""Loss and perplexity of a checkpoint on held-out text, domain by domain.

    python -m tools.evaluate CKPT --data .cache/quickstart/validation/en-books ...
    python -m tools.evaluate RUN_DIR --data PREFIX ...       its newest good checkpoint

Windows are cut as for data.validation of a run. Prints a table, and writes it as JSON.
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
    from megatron_ext.data.indexed import IndexedCorpus


@dataclass(kw_only=True)
class Score:
    """One domain."""

    loss: float
    """Mean nats per token."""

    perplexity: float
    tokens: int
    """Tokens predicted."""


def main(argv: list[str] | None = None) -> int:
    """Score, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="of any layout, or a run folder")
    parser.add_argument("--data", nargs="+", required=True, metavar="PREFIX", help=".bin/.idx")
    parser.add_argument("--length", type=int, help="tokens of a window; default: as trained")
    parser.add_argument("--tokens", type=int, help="the first ones of each domain; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate.json"))
    args = parser.parse_args(argv)
    for key in ("length", "tokens"):
        if (value := getattr(args, key)) is not None and value < 1:
            raise ValueError(f"--{key}={value} must be at least 1.")

    from megatron_ext import atomic
    from megatron_ext.checkpoint.folder import checkpoint_of
    from megatron_ext.checkpoint.parent import trained_length

    checkpoint = checkpoint_of(args.checkpoint)
    length = args.length or trained_length(checkpoint)
    scores = evaluate(checkpoint, args.data, length=length, tokens=args.tokens)
    print(table(scores))
    report = {"checkpoint": str(checkpoint), "length": length}
    report |= {"domains": {name: asdict(score) for name, score in scores.items()}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(args.out, json.dumps(report, indent=1) + "\n")
    print(args.out)
    return 0


def evaluate(
    checkpoint: Path, prefixes: list[str], *, length: int, tokens: int | None = None
) -> dict[str, Score]:
    """The score of each corpus by its name: windows of ``length`` in its order, in fp32.

    Raises:
        ValueError: two corpora of one name, one without a token to predict, or one of another
            vocabulary.
    """
    from megatron_ext.convert.described import model_of
    from megatron_ext.data.indexed import IndexedCorpus
    from megatron_ext.evaluate import alone

    corpora = {Path(prefix).name: IndexedCorpus(prefix, key="--data") for prefix in prefixes}
    if len(corpora) < len(prefixes):
        raise ValueError(f"--data {' '.join(prefixes)}: two domains have one name.")
    shape = model_of(checkpoint)[0]
    for name, corpus in corpora.items():
        if corpus.num_tokens < 2:
            raise ValueError(f"--data {name} has no token to predict.")
        alone.check_ids(checkpoint, shape, int(corpus.tokens.max()), what=f"--data {name}")
    with alone.loaded(checkpoint) as model:
        return {
            name: score(model, corpus, length=length, tokens=tokens)
            for name, corpus in corpora.items()
        }


def score(model: Any, corpus: "IndexedCorpus", *, length: int, tokens: int | None) -> Score:
    """One domain, each token predicted once from those before it in its window."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from megatron_ext.data.held_out import HeldOut
    from megatron_ext.evaluate.loss_by_position import token_losses

    text = HeldOut(corpus, seq_length=length, tokens=tokens or corpus.num_tokens)
    total = 0.0
    begins = range(0, text.scored, length)
    for begin in tqdm(begins, desc=Path(corpus.prefix).name, unit="window", disable=None):
        piece = corpus.tokens[begin : min(begin + length, text.scored) + 1]
        total += float(token_losses(model, torch.from_numpy(piece.astype(np.int64))).double().sum())
    loss = total / text.scored
    return Score(
        loss=loss, perplexity=math.exp(loss) if loss < 700 else math.inf, tokens=text.scored
    )


def table(scores: dict[str, Score]) -> str:
    """One line a domain."""
    width = max(6, *map(len, scores))
    head = f"{'domain':{width}s} {'loss':>9s} {'perplexity':>12s} {'tokens':>13s}"
    return "\n".join(
        [head]
        + [
            f"{name:{width}s} {one.loss:9.4f} {one.perplexity:12,.2f} {one.tokens:13,}"
            for name, one in scores.items()
        ]
    )


if __name__ == "__main__":
    sys.exit(refusing(main))

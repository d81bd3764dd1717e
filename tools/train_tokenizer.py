"""Trains a SentencePiece BPE tokenizer by Yi's rules on JSONL or text files.

python -m tools.train_tokenizer corpus/train/*.jsonl --out tokenizer.model --vocab-size 8192
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tools.train_tokenizer", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("inputs", type=Path, nargs="+", help="JSONL or text files")
    parser.add_argument("--out", type=Path, required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=8192, help="pieces, bytes included")
    parser.add_argument("--key", default="text", help="field of a JSONL line that holds the text")
    parser.add_argument(
        "--sample-mb", type=float, default=30.0, help="text to train on, drawn evenly from all"
    )
    return parser.parse_args(arguments)


def texts(inputs: list[Path], key: str) -> Iterator[str]:
    """Every document's text; what cannot be read is left to tools.prepare to report."""
    from megatron_ext.data.documents import Reading, read_documents

    for path in inputs:
        yield from (text for _, text in read_documents(path, Reading(key=key)))


def main() -> int:
    """Train and say what came out."""
    options = parse()
    if options.vocab_size < 300:
        raise ValueError(
            f"--vocab-size={options.vocab_size} must hold 256 bytes, 3 control pieces and "
            f"characters: use 300 or more."
        )
    from megatron_ext.data.tokenizer_training import train_tokenizer

    size = train_tokenizer(
        texts(options.inputs, options.key),
        options.out,
        vocab_size=options.vocab_size,
        sample_bytes=int(options.sample_mb * 1e6),
    )
    print(f"{options.out}: {size} pieces")
    if size < options.vocab_size:
        print(f"the text is too small for the {options.vocab_size} asked for", file=sys.stderr)
    return 0


if __name__ == "__main__":
    from launch.cli import refusing

    sys.exit(refusing(main))

"""Indexes JSONL or text files as Megatron .bin/.idx corpora.

    python -m tools.prepare corpus/train/*.jsonl --tokenizer tokenizer.model --out indexed/train

Each input becomes a corpus of its own name in --out; with --merge NAME all become one.
"""

import argparse
import os
import sys
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools.prepare", description=__doc__.split("\n\n")[0])
    parser.add_argument("inputs", type=Path, nargs="+", help="JSONL files, or text files whole")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="SentencePiece .model, cl100k .tiktoken or tokenizer.json",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write corpora in")
    parser.add_argument("--merge", default="", metavar="NAME", help="one corpus of all inputs")
    parser.add_argument("--key", default="text", help="field of a JSONL line that holds the text")
    parser.add_argument("--domain", default="", help="tag of the corpora; default: their names")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that encode"
    )
    parser.add_argument("--no-eod", action="store_true", help="do not end documents by a token")
    parser.add_argument("--min-tokens", type=int, default=0, help="leave out shorter documents")
    parser.add_argument(
        "--max-tokens", type=int, default=0, help="leave out longer documents; 0 keeps all"
    )
    parser.add_argument(
        "--on-bad", default="skip", choices=("skip", "stop"), help="what a bad line does"
    )
    parser.add_argument(
        "--check", action="store_true", help="decode what was written and compare with the text"
    )
    parser.add_argument(
        "--engine",
        default="auto",
        choices=("auto", "library"),
        help="auto: GigaToken where it is installed and agrees with the tokenizer's library",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace corpora of other content")
    return parser.parse_args(arguments)


def outputs(options: argparse.Namespace) -> dict[Path, list[Path]]:
    """Input files by the prefix they are written under.

    Raises:
        ValueError: a file is missing, or two would be written to one place.
    """
    for path in options.inputs:
        if not path.is_file():
            raise ValueError(f"inputs: {path} is not a file.")
    if options.merge:
        if Path(options.merge).name != options.merge:
            raise ValueError(f"--merge={options.merge} must be a name, without a folder.")
        return {options.out / options.merge: options.inputs}
    found: dict[Path, list[Path]] = {}
    for path in options.inputs:
        found.setdefault(options.out / path.name.split(".")[0], []).append(path)
    for prefix, paths in found.items():
        if len(paths) > 1:
            raise ValueError(
                f"--out={options.out}: {' and '.join(map(str, paths))} would both become "
                f"{prefix.name}: use --merge NAME, or other folders."
            )
    return found


def main() -> int:
    """Prepare what is not up to date; report what was left out."""
    options = parse()
    if options.workers < 1:
        raise ValueError(f"--workers={options.workers} must be 1 or more.")
    wanted = outputs(options)
    from tqdm import tqdm

    from megatron_ext.data.documents import Reading
    from megatron_ext.data.fast_encoder import fastest
    from megatron_ext.data.prepare import Preparation, is_up_to_date, prepare_corpus
    from megatron_ext.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    if options.engine == "auto":
        tokenizer = fastest(tokenizer)
    left_out = Reading()
    total = sum(path.stat().st_size for path in options.inputs)
    # Shown on a terminal, and as lines every ten seconds elsewhere.
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(total=total, unit="B", unit_scale=True, desc="index", mininterval=interval) as bar:
        for prefix, inputs in wanted.items():
            how = Preparation(
                tokenizer=tokenizer,
                reading=Reading(key=options.key, on_bad=options.on_bad),
                workers=options.workers,
                append_eod=not options.no_eod,
                min_tokens=options.min_tokens,
                max_tokens=options.max_tokens,
                check=options.check,
            )
            if prefix.with_name(prefix.name + ".idx").exists():
                if is_up_to_date(prefix, inputs, how):
                    bar.update(sum(path.stat().st_size for path in inputs))
                    bar.write(f"  {prefix}: up to date")
                    continue
                if not options.overwrite:
                    raise ValueError(
                        f"--out={options.out}: {prefix} is there and holds something else: name "
                        f"another folder, or --overwrite."
                    )
            facts = prepare_corpus(inputs, prefix, how, domain=options.domain, progress=bar.update)
            left_out.add(how.reading)
            lost = facts.get("documents_not_restored")
            checked = (
                "" if lost is None else f", decoded back, but for {lost} that the tokenizer alters"
            )
            bar.write(
                f"  {prefix}: {facts['documents']} documents, {facts['tokens']} tokens{checked}"
            )
    report(left_out)
    return 0


def report(left_out) -> None:  # type: ignore[no-untyped-def]
    """Say what was left out, by kind and for the first ones by place."""
    for kind, count in sorted(left_out.counts.items()):
        print(f"left out {count}: {kind}", file=sys.stderr)
    for words in left_out.named:
        print(f"  {words}", file=sys.stderr)
    if sum(left_out.counts.values()) > len(left_out.named):
        print("  ...", file=sys.stderr)


if __name__ == "__main__":
    from launch.cli import refusing

    sys.exit(refusing(main))

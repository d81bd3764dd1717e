"""A document with its domain and source, and what makes it fit for training."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
BLANK_LINES = re.compile(r"\n{3,}")


class Document(NamedTuple):
    """One text."""

    text: str
    domain: str
    source: str


def clean(text: str) -> str:
    """Drop terminal colours, control characters, trailing blanks and runs of empty lines."""
    text = CONTROL.sub("", ANSI.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))
    lines = (line.rstrip(" \t") for line in text.split("\n"))
    return BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n ")


def text_hash(text: str) -> str:
    """sha1 of the text without its white space: what counts as the same text."""
    return hashlib.sha1("".join(text.split()).encode()).hexdigest()


def distinct(documents: Iterable[Document]) -> Iterator[tuple[str, Document]]:
    """Cleaned documents with their hash; empty ones and all but the first of equals left out."""
    seen = set()
    for document in documents:
        text = clean(document.text)
        name = text_hash(text)
        if text and name not in seen:
            seen.add(name)
            yield name, document._replace(text=text)


def split(
    documents: Iterable[tuple[str, Document]], *, validation_share: float
) -> tuple[list[Document], list[Document]]:
    """Train and validation, by each text's own hash, so that another machine splits alike.

    Of each domain the documents of smallest hash are held out until they are
    ``validation_share`` of its bytes: at least one, and never all.
    """
    train, validation = list[Document](), list[Document]()
    by_domain: dict[str, list[tuple[str, Document]]] = {}
    for name, document in documents:
        by_domain.setdefault(document.domain, []).append((name, document))
    for named in by_domain.values():
        sizes = {name: len(document.text.encode()) for name, document in named}
        wanted, held_out = validation_share * sum(sizes.values()), set[str]()
        for name in sorted(sizes)[:-1]:
            if wanted <= 0:
                break
            held_out.add(name)
            wanted -= sizes[name]
        for name, document in named:
            (validation if name in held_out else train).append(document)
    return train, validation

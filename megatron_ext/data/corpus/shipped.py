"""The small bilingual corpus of our own writing, for machines without a network."""

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.data.corpus.document import Document

FOLDER = Path(__file__).with_name("shipped")


def documents() -> Iterator[Document]:
    """Every document that the repository ships, domain by domain."""
    for path in sorted(FOLDER.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield Document(json.loads(line)["text"], path.stem, "shipped")

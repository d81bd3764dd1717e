"""Documents of packages in both languages: instructions, web pages, articles, and code."""

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.data.corpus.archives import members
from megatron_ext.data.corpus.document import Document

ROLES = {
    "zh": {"human": "用户", "user": "用户", "gpt": "助手", "assistant": "助手"},
    "en": {"human": "User", "user": "User", "gpt": "Assistant", "assistant": "Assistant"},
}


def instructions(path: Path) -> Iterator[Document]:
    """Questions with answers, as plain text; of preference pairs the chosen answer."""
    for language, words in ROLES.items():
        domain = f"{language}-instruct"
        names = [f"data/{kind}_{language}_demo.json" for kind in ("alpaca", "dpo")]
        for name, content in members(path, *names):
            for item in json.loads(content):
                text = _dialogue(item, words) if "dpo" in name else _answered(item)
                yield Document(text, domain, "llamafactory")


def _answered(item: dict[str, str]) -> str:
    parts = (item["instruction"], item["input"], item["output"])
    return "\n\n".join(part for part in parts if part)


def _dialogue(item: dict, words: dict[str, str]) -> str:
    turns = [*item["conversations"], item["chosen"]]
    return "\n\n".join(f"{words.get(t['from'], t['from'])}: {t['value']}" for t in turns)


def articles(path: Path) -> Iterator[Document]:
    """Thirty long encyclopaedia articles, one a line."""
    ((_, content),) = members(path, "data/wiki_demo.txt")
    for line in content.decode().splitlines():
        yield Document(line, "en-encyclopaedia", "llamafactory")


def web_pages(path: Path) -> Iterator[Document]:
    """Three hundred web pages."""
    ((_, content),) = members(path, "data/c4_demo.jsonl")
    for line in content.decode().splitlines():
        yield Document(json.loads(line)["text"], "en-web", "llamafactory")


def code(path: Path, source: str) -> Iterator[Document]:
    """Every Python file of a package, with whatever language its comments are in."""
    for _, content in members(path, "*.py"):
        try:
            yield Document(content.decode(), "code", source)
        except UnicodeDecodeError:
            continue  # a few test files are in other encodings on purpose

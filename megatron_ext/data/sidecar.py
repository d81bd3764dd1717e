"""What is written beside a corpus: whose tokens, how many, and a fingerprint to check against."""

import json
from pathlib import Path
from typing import Any

from megatron_ext.atomic import write_text
from megatron_ext.data.indexed import IndexedCorpus, fingerprint


def describe(prefix: str | Path, **facts: Any) -> dict[str, Any]:
    """Write ``<prefix>.json`` with ``facts``, the sizes of the pair and its fingerprint."""
    corpus = IndexedCorpus(prefix)
    description = {
        "documents": corpus.num_documents,
        "tokens": corpus.num_tokens,
        "dtype": corpus.dtype.name,
        "fingerprint": fingerprint(prefix),
        **facts,
    }
    text = json.dumps(description, indent=1, ensure_ascii=False, sort_keys=True)
    write_text(Path(f"{prefix}.json"), text + "\n")
    return description

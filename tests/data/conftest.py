"""Small corpora in which every token says where it comes from."""

import numpy as np
import pytest

from megatron_ext.data.indexed import IndexedCorpus
from megatron_ext.data.writer import CorpusWriter


@pytest.fixture
def write_corpus():
    """A writer of corpora whose tokens are ``first``, ``first + 1``, ...: each occurs once."""

    def write(prefix, *, documents, seed, longest=40, first=0):
        lengths = np.random.default_rng(seed).integers(1, longest, documents)
        with CorpusWriter(prefix, dtype=np.int32) as writer:
            writer.add_documents(np.arange(first, first + lengths.sum()), lengths)
        return IndexedCorpus(prefix)

    return write

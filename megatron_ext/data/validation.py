"""Fixed windows of a held-out corpus, in the order of its file."""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_ext.data.indexed import IndexedCorpus


def validation_windows(corpus: IndexedCorpus, length: int, tokens: int) -> int:
    """Windows of ``length`` that about ``tokens`` tokens fill; at least one."""
    return max(1, min(tokens, corpus.num_tokens - 1) // length)


def validation_window(
    corpus: IndexedCorpus, numbers: Sequence[int], length: int, windows: int
) -> dict[str, torch.Tensor]:
    """Windows ``numbers`` as a micro-batch ``[b, length]``.

    A window past the last one counts no token, and neither does what a short corpus cannot fill.
    """
    tokens = np.zeros((len(numbers), length + 1), dtype=np.int64)
    mask = np.zeros((len(numbers), length), dtype=np.float32)
    for row, number in enumerate(numbers):
        if number >= windows:
            continue
        piece = corpus.tokens[number * length : number * length + length + 1]
        tokens[row, : len(piece)] = piece
        mask[row, : len(piece) - 1] = 1
    whole = torch.from_numpy(tokens)
    return {
        "tokens": whole[:, :-1].contiguous(),
        "labels": whole[:, 1:].contiguous(),
        "loss_mask": torch.from_numpy(mask),
        "position_ids": torch.arange(length).expand(len(numbers), length).contiguous(),
    }

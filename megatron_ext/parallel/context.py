"""Which part of every sequence a context-parallel rank holds."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def own_slice(batch: "Mapping[str, Tensor]", *, rank: int, size: int) -> "dict[str, Tensor]":
    """Chunks ``rank`` and ``2 * size - 1 - rank`` of each ``[b, s]`` tensor's ``2 * size``.

    An early and a late chunk together cost the same under a causal mask on every rank. Positions
    stay those of the whole sequence; Megatron's rotary embedding and Transformer Engine's
    attention count on this order.

    Raises:
        ValueError: packed documents, or a length that does not divide.
    """
    if size == 1:
        return dict(batch)
    import torch

    if "cu_seqlens" in batch:
        raise ValueError("packed documents cannot be sliced over context-parallel ranks.")
    cut = {}
    for name, whole in batch.items():
        if whole.shape[1] % (2 * size):
            raise ValueError(
                f"a sequence of {whole.shape[1]} is not a multiple of 2 * "
                f"parallel.context_parallel_size = {2 * size}."
            )
        chunks = whole.chunk(2 * size, dim=1)
        cut[name] = torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim=1)
    return cut

"""Proof at start-up that packed documents do not see each other on the attention in use.

Attention back ends differ in which masks they honour, and some ignore what they do not know
without a word. So the kernel that will train is asked: a pack of documents, then each alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

LENGTHS = (45, 16, 67)
"""Documents of the pack: uneven, and none a multiple of a kernel's tile but one."""

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
"""Largest difference in the output, whose elements are below 1 for unit-variance values."""


def prove_isolation(chunks: "list[nn.Module]") -> float:
    """Largest difference between packed documents and each alone, on this rank's first attention.

    Every rank calls it for itself; there is no communication. Stages without layers give 0.

    Raises:
        ValueError: packed documents see each other.
    """
    found = next((m for c in chunks for m in c.modules() if hasattr(m, "core_attention")), None)
    if found is None:
        return 0.0
    difference, dtype = _difference(found)
    if not difference <= TOLERANCE[dtype]:  # NaN counts as seen
        raise ValueError(
            f"packing=document cannot be isolated by {type(found.core_attention).__name__}: a "
            f"packed document differs from the same one alone by {difference:.3g} (at most "
            f"{TOLERANCE[dtype]:g} in {dtype}); choose another kernels.attention_backend, or "
            f"packing=crossdoc."
        )
    return difference


def _difference(attention: Any) -> "tuple[float, str]":
    import torch

    weight = next(attention.parameters())
    generator = torch.Generator().manual_seed(0)
    heads = attention.num_attention_heads_per_partition
    groups = attention.num_query_groups_per_partition
    size = attention.hidden_size_per_attention_head
    query, key, value = (
        torch.randn(sum(LENGTHS), n, size, generator=generator).to(weight)
        for n in (heads, groups, groups)
    )
    with torch.no_grad():
        packed = _attend(attention, query, key, value, list(LENGTHS))
        alone = [
            _attend(attention, q, k, v, [len(q)])
            for q, k, v in zip(*(x.split(LENGTHS) for x in (query, key, value)))
        ]
    difference = (packed.float() - torch.cat(alone).float()).abs().max().item()
    return difference, str(weight.dtype).removeprefix("torch.")


def _attend(
    attention: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    lengths: list[int],
) -> "torch.Tensor":
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, *lengths]).cumsum(0).to(query.device, torch.int32)
    longest = max(lengths)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    out = attention.core_attention(
        query,
        key,
        value,
        None,
        attn_mask_type=attention.attn_mask_type,
        packed_seq_params=packed,
    )
    return out.reshape(len(query), -1)

"""Context-parallel ranks share a sequence out as Megatron's attention expects."""

import pytest
import torch

from megatron_ext.parallel.context import own_slice


def test_ranks_hold_every_token_once_an_early_and_a_late_part_each() -> None:
    tokens = torch.arange(24).view(2, 12)
    parts = [own_slice({"tokens": tokens}, rank=r, size=3)["tokens"] for r in range(3)]
    assert parts[0][0].tolist() == [0, 1, 10, 11]
    assert parts[2][0].tolist() == [4, 5, 6, 7]
    assert torch.cat(parts, dim=1).sort(dim=1).values.equal(tokens)


def test_the_slices_are_those_of_megatron() -> None:
    from unittest import mock

    from megatron_ext.devices import device

    device.start()
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    batch = {"tokens": torch.arange(32).view(2, 16), "labels": torch.arange(32).view(2, 16) + 1}
    for rank in range(2):
        with (
            mock.patch.object(parallel_state, "get_context_parallel_world_size", lambda: 2),
            mock.patch.object(parallel_state, "get_context_parallel_rank", lambda r=rank: r),
        ):
            wanted = get_batch_on_this_cp_rank(dict(batch))
        found = own_slice(batch, rank=rank, size=2)
        assert all(found[name].equal(wanted[name]) for name in batch)


def test_one_rank_keeps_everything_and_packed_documents_are_refused() -> None:
    batch = {"tokens": torch.arange(7)[None]}
    assert own_slice(batch, rank=0, size=1)["tokens"] is batch["tokens"]
    with pytest.raises(ValueError, match="not a multiple of"):
        own_slice(batch, rank=0, size=2)
    packed = {"tokens": torch.arange(8)[None], "cu_seqlens": torch.tensor([0, 8])}
    with pytest.raises(ValueError, match="packed documents"):
        own_slice(packed, rank=0, size=2)

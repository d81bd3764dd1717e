"""A small tensor of every rank, on every rank. Bytes are sent, nothing is unpickled."""

import torch
import torch.distributed as dist
from torch import Tensor


def of_every_rank(mine: Tensor, *, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """``mine`` of each rank of ``group`` (default: of the job) in order; all of them must call it.

    Nothing is sent where there is this rank alone.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [mine]
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return everyone

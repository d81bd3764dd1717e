"""What ranks tell each other around a checkpoint: small objects, on whatever backend there is."""

from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """This process among all; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in all; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any) -> list[Any] | None:
    """Everybody's ``value`` by rank, on rank 0; None elsewhere."""
    if not dist.is_initialized():
        return [value]
    everybody = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, everybody)
    return everybody


def gather_on_all(value: Any) -> list[Any]:
    """Everybody's ``value`` by rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    everybody = [None] * world_size()
    dist.all_gather_object(everybody, value)
    return everybody


def from_first(value: Any) -> Any:
    """Rank 0's ``value``, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_agree(yes: bool) -> bool:
    """Whether every rank says yes."""
    if not dist.is_initialized():
        return yes
    place = torch.device("cpu")
    if "gloo" not in dist.get_backend():
        place = torch.device("cuda", torch.cuda.current_device())
    votes = torch.tensor([int(yes)], device=place)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes.item())

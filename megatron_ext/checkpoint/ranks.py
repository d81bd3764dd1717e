"""What ranks tell each other around a checkpoint: small objects, on whatever backend there is."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

Result = TypeVar("Result")


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


def together(act: Callable[[], Result]) -> Result:
    """Do ``act`` on every rank; if it fails on one, fail on all, rather than leave them waiting.

    Raises:
        Exception: what the first rank to fail raised; a ValueError of its words where it cannot
            be told to others.
    """
    result, failure = None, None
    try:
        result = act()
    except (ValueError, OSError) as error:
        failure = error
    except Exception as error:
        failure = ValueError(f"rank {rank()}: {error!r}")
    for one in gather_on_all(failure):
        if one is not None:
            raise one
    return cast(Result, result)

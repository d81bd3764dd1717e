"""Which rank sits on which node."""

import torch
import torch.distributed as dist

from megatron_ext.parallel.env import own_host

NAME_BYTES = 64


def host_of_ranks(place: torch.device) -> list[str]:
    """The node of every rank; every rank must call this. Bytes are sent, nothing is unpickled."""
    name = own_host().encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")
    mine = torch.tensor(list(name), dtype=torch.uint8, device=place)
    everyone = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in everyone]

"""Which rank sits on which node."""

import torch

from megatron_ext.parallel.env import own_host
from megatron_ext.parallel.gather import of_every_rank

NAME_BYTES = 64


def host_of_ranks(place: torch.device) -> list[str]:
    """The node of every rank; every rank must call this."""
    name = own_host().encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")
    mine = torch.tensor(list(name), dtype=torch.uint8, device=place)
    rows = (bytes(row.tolist()) for row in of_every_rank(mine))
    return [row.rstrip(b"\0").decode(errors="replace") for row in rows]

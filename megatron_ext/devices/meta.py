"""The meta device in place of a GPU, for a dry run: shapes and sizes, no bytes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megatron_ext.devices import device

META = torch.device("meta")
DATA_PARALLEL_GROUPS = (
    "_DATA_PARALLEL_GROUP",
    "_DATA_PARALLEL_GROUP_WITH_CP",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP",
    "_EXPERT_DATA_PARALLEL_GROUP",
    "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP",
)
"""Groups of which Megatron keeps a second one on gloo for checkpoints."""


@contextlib.contextmanager
def entered() -> Iterator[None]:
    """Everything allocated inside holds no memory, gradient buffers and optimizer shards too.

    Megatron asks ``torch.cuda.current_device`` where to allocate those, and sorts parameters by
    the name of their type, which for meta tensors it does not know.
    """
    cuda: Any = torch.cuda
    here, plain = cuda.current_device, torch.Tensor.type

    def named(self: torch.Tensor, *to: Any, **options: Any) -> Any:
        # Under a device context torch looks this method up by name again, and would find us.
        with torch._C.DisableTorchFunction():
            name = plain(self, *to, **options)
        if not isinstance(name, str) or ".meta." not in name:
            return name
        # On a CPU the optimizers' own substitution adds "cuda" to the plain name.
        kind = name.rsplit(".", 1)[-1]
        return f"torch.{kind}" if device.current().name == "cpu" else f"torch.cuda.{kind}"

    cuda.current_device = lambda: META
    torch.Tensor.type = named  # type: ignore[assignment,method-assign]
    try:
        with META:
            yield
    finally:
        cuda.current_device = here
        torch.Tensor.type = plain  # type: ignore[method-assign]


def share_groups_with_gloo() -> None:
    """Let the fake groups stand in for their gloo twins, which would open sockets."""
    from megatron.core import parallel_state

    for name in DATA_PARALLEL_GROUPS:
        setattr(parallel_state, f"{name}_GLOO", getattr(parallel_state, name))

"""Which boxes of which stored tensors a rank holds: weights, moments, master weights.

Keys and cuts of the model are Megatron's own (``sharded_state_dict``). The optimizer's follow the
parameters', under the keys of Megatron's plain optimizer, also where a distributed optimizer
holds flat ranges: any layout can read what any other has saved, and nothing is gathered.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.checkpoint.rectangles import Box, cut, whole
from megatron_ext.checkpoint.shard import Slot
from megatron_ext.models.fp8_history import histories
from megatron_ext.optim.moments import MOMENTS, held

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

OPTIMIZER = "optimizer.state"
MASTER = "fp32_param"


@dataclass(frozen=True)
class Part:
    """A run of a local tensor's flattened elements that is one box of a stored tensor."""

    key: str
    shape: tuple[int, ...]
    origin: tuple[int, ...]
    local_shape: tuple[int, ...]
    start: int
    flexible: bool
    replica: tuple[int, ...]

    def slots(
        self, flat: torch.Tensor, *, first: int = 0, prefix: str = "", shared: bool = True
    ) -> Iterator[Slot]:
        """Boxes of this part in ``flat``, which holds the local tensor's elements from ``first``.

        ``shared`` says that all data-parallel ranks hold the same, so one of them must be chosen.
        """
        length = torch.Size(self.local_shape).numel()
        begin = max(first, self.start)
        end = min(first + flat.numel(), self.start + length)
        lead = (1,) * (len(self.shape) - len(self.local_shape))
        main = not any(self.replica[:-1])
        for box in cut(self.local_shape, begin - self.start, end - self.start):
            data = flat[begin - first : begin - first + box.numel()]
            begin += box.numel()
            inside = Box((0,) * len(lead) + box.offset, lead + box.size).shifted(self.origin)
            yield Slot(prefix + self.key, self.shape, inside, data, main, self.flexible, shared)


def slots(
    chunks: Sequence[Any], optimizer: "MegatronOptimizer | None", *, moments: bool = True
) -> list[Slot]:
    """Everything of the model and the optimizer that this rank holds, or all but the moments."""
    parts = model_parts(chunks)
    found = [slot for tensor, some in parts for part in some for slot in part.slots(_flat(tensor))]
    if optimizer is not None:
        by_param = {id(tensor): some for tensor, some in parts}
        found += _optimizer_slots(optimizer, by_param, MOMENTS if moments else ())
    return [*found, *_fp8_slots(chunks)]


def _fp8_slots(chunks: Sequence[Any]) -> Iterator[Slot]:
    """Delayed scaling's histories, which all ranks of a stage hold alike."""
    from megatron.core.parallel_state import get_tensor_model_parallel_rank

    for key, tensor in histories(chunks):
        shape, main = tuple(tensor.shape), get_tensor_model_parallel_rank() == 0
        yield Slot(key, shape, whole(shape), tensor.detach(), main, shared=True)


def share_out(found: list[Slot], rank: int, size: int) -> list[Slot]:
    """The slots this data-parallel rank writes: its own, and a fair part of the common ones.

    Data-parallel ranks hold the same list of common slots, so they agree without talking.
    """
    common = [slot for slot in found if slot.shared]
    owner: dict[int, int] = {}
    loads = [(0, r) for r in range(size)]
    for slot in sorted(common, key=lambda slot: -slot.data.nbytes):
        load, least = heapq.heappop(loads)
        owner[id(slot)] = least
        heapq.heappush(loads, (load + slot.data.nbytes, least))
    return [slot for slot in found if slot.main and owner.get(id(slot), rank) == rank]


def model_parts(chunks: Sequence[Any]) -> list[tuple[torch.Tensor, list[Part]]]:
    """Every tensor of the model that is saved, with the boxes it consists of.

    Raises:
        ValueError: a parameter that Megatron's ``sharded_state_dict`` leaves out.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
    from megatron.core.utils import unwrap_model

    found = []
    for chunk in unwrap_model(list(chunks)):
        saved = set()
        metadata = ensure_metadata_has_dp_cp_group(None)
        for sharded in nested_values(chunk.sharded_state_dict(metadata=metadata)):
            if isinstance(sharded, ShardedTensorFactory):
                pieces = list(nested_values(sharded.build()))
            elif isinstance(sharded, ShardedTensor):
                pieces = [sharded]
            else:
                continue  # Transformer Engine's _extra_state: a pickle; see models/fp8_history.py
            saved.add(id(sharded.data))
            found.append((sharded.data, [_part(piece, sharded.data) for piece in pieces]))
        for name, param in chunk.named_parameters():
            if id(param) not in saved:
                raise ValueError(
                    f"parameter {name} would not be saved: {type(chunk).__name__}'s "
                    f"sharded_state_dict leaves it out (make it a child module's parameter)."
                )
    return found


def _part(piece: Any, tensor: torch.Tensor) -> Part:
    return Part(
        key=piece.key,
        shape=tuple(piece.global_shape),
        origin=tuple(piece.global_offset),
        local_shape=tuple(piece.local_shape),
        start=piece.data.storage_offset() - tensor.storage_offset(),
        flexible=piece.allow_shape_mismatch,
        replica=tuple(piece.replica_id),
    )


def _optimizer_slots(
    optimizer: "MegatronOptimizer", by_param: dict[int, list[Part]], moments: Sequence[str]
) -> Iterator[Slot]:
    for one in held(optimizer):
        tensors = {name: one.state()[name] for name in moments}
        if one.has_master():
            tensors[MASTER] = one.main
        for name, tensor in tensors.items():
            for part in by_param[id(one.param)]:
                yield from part.slots(
                    _flat(tensor),
                    first=one.start,
                    prefix=f"{OPTIMIZER}.{name}.",
                    shared=not one.sharded,
                )


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1)

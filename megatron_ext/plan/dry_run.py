"""The real model, gradient buckets and optimizer, built at the real world size without memory.

A fake process group says that all ranks are there, the meta device gives tensors without bytes.
One rank of every distinct pipeline stage, at the first and last TP position, is built by the code
that trains, so that Megatron's own refusals are met here; what it allocates is counted and held
against the plan.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.plan.layout import Layout, Shape
from megatron_ext.plan.memory import stage_memory

TOLERANCE = 0.02
"""Bucket padding and per-rank rounding; anything larger is a disagreement about the model."""


@dataclass(kw_only=True, frozen=True)
class Counted:
    """One rank, as built and as planned. Bytes, but for the parameters."""

    rank: int
    stage: int
    tp_rank: int
    parameters: int
    whole: int
    """Parameters of the stage over all its TP positions, replicated ones once."""

    weights: int
    gradients: int
    optimizer: int
    """Masters as built, and the two moments that the first step adds."""

    planned: dict[str, float]

    def off(self) -> dict[str, float]:
        """Counted over planned, less one, for each kind."""
        kinds = ("parameters", "weights", "gradients", "optimizer")
        return {kind: getattr(self, kind) / max(self.planned[kind], 1) - 1 for kind in kinds}

    @property
    def agrees(self) -> bool:
        """Whether every kind is within the tolerance."""
        return all(abs(off) <= TOLERANCE for off in self.off().values())


def rank_at(layout: Layout, order: str, *, tp_rank: int, stage: int) -> int:
    """The global rank at a TP position of a stage, first in every other axis."""
    sizes = {"tp": layout.tp, "cp": layout.cp, "ep": 1, "dp": layout.dp, "pp": layout.pp}
    places = {"tp": tp_rank, "pp": stage}
    rank, stride = 0, 1
    for axis in order.split("-"):
        rank += places.get(axis, 0) * stride
        stride *= sizes[axis]
    return rank


def alike(shape: Shape, layout: Layout) -> list[int]:
    """For every stage the first of its kind: by layers of its chunks, and by being an end."""
    seen: dict[tuple[Any, ...], int] = {}
    kinds = [
        (tuple(chunks), stage == 0, stage == layout.pp - 1)
        for stage, chunks in enumerate(layout.chunk_layers(shape.layers))
    ]
    return [seen.setdefault(kind, stage) for stage, kind in enumerate(kinds)]


def distinct_stages(shape: Shape, layout: Layout) -> list[int]:
    """One stage of each kind."""
    return sorted(set(alike(shape, layout)))


def built_parameters(run: RunConfig, world_size: int, built: list[Counted]) -> int:
    """Parameters of the whole model, padding rows of the vocabulary left out."""
    layout = Layout.of(run, world_size)
    shape = Shape.of(run.model, layout.tp)
    of = {one.stage: one.whole for one in built if one.tp_rank == 0}
    padding = (shape.vocab - run.model.vocab_size) * shape.hidden * (1 if shape.tied else 2)
    return sum(of[stage] for stage in alike(shape, layout)) - padding


def dry_run(run: RunConfig, world_size: int) -> list[Counted]:
    """Build every distinct rank of ``run`` on ``world_size`` ranks.

    Raises:
        ValueError: the layout is impossible by our own checks, or Megatron refuses it; its words
            are passed on with the rank.
    """
    from megatron_ext.devices import device

    layout = Layout.of(run, world_size)
    shape = Shape.of(run.model, layout.tp)
    device.start()
    counted = []
    for stage in distinct_stages(shape, layout):
        for tp_rank in sorted({0, layout.tp - 1}):
            rank = rank_at(layout, run.parallel.order, tp_rank=tp_rank, stage=stage)
            sizes = _build(run, world_size, rank)
            counted.append(
                Counted(
                    rank=rank,
                    stage=stage,
                    tp_rank=tp_rank,
                    planned=_planned(shape, layout, stage),
                    **sizes,
                )
            )
    return counted


def _planned(shape: Shape, layout: Layout, stage: int) -> dict[str, float]:
    memory = stage_memory(shape, layout)[stage]
    names = ("parameters", "weights", "gradients", "optimizer")
    return {name: getattr(memory, name) for name in names}


def _build(run: RunConfig, world_size: int, rank: int) -> dict[str, int]:
    """Build one rank and count it; leaves no process group behind."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if dist.is_initialized():
        raise RuntimeError("a dry run needs a process that has joined no process group")
    try:
        groups = _pretend(run, world_size, rank)
        return _count(_buildable(run), groups)
    except (AssertionError, RuntimeError, TypeError) as refusal:
        words = str(refusal).strip() or type(refusal).__name__
        raise ValueError(
            f"Megatron refuses rank {rank} of {world_size}: {words.splitlines()[0]}"
        ) from refusal
    finally:
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _buildable(run: RunConfig) -> RunConfig:
    """``run`` with whole sequences where context parallelism cannot be built.

    That needs Transformer Engine's attention, which has no parameters and so changes no byte that
    is counted here; the groups stay as they are.
    """
    from megatron_ext.models.gpt import uses_transformer_engine

    if run.parallel.context_parallel_size == 1 or uses_transformer_engine(run):
        return run
    return replace(run, parallel=replace(run.parallel, context_parallel_size=1))


def _pretend(run: RunConfig, world_size: int, rank: int) -> Any:
    """Process groups of ``rank`` among ranks that are not there."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_ext.devices import meta
    from megatron_ext.parallel.groups import seed_everything

    parallel = run.parallel
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        order=parallel.order,
        create_gloo_process_groups=False,
    )
    meta.share_groups_with_gloo()
    seed_everything(run.seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def _count(run: RunConfig, groups: Any) -> dict[str, int]:
    """Build model, buckets and optimizer of this rank, and count what they hold."""
    from megatron_ext.devices import meta
    from megatron_ext.models.gpt import build_model
    from megatron_ext.optim.build import build_optimizer

    with meta.entered():
        chunks = build_model(run, groups, meta=True)
        optimizer = build_optimizer(run, chunks, groups)
    buffers = [b for chunk in chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    held = sum(p.numel() * p.element_size() for p in parameters)
    if all(buffer.param_data is not None for buffer in buffers):
        held = sum(_bytes(buffer.param_data) for buffer in buffers)
    # Moments are made at the first step, two fp32 values beside each element that is updated;
    # fp32 weights are updated in place, others through an fp32 master.
    master = 0 if run.precision.dtype == "fp32" else 4
    elements = 0
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        elements += sum(p.numel() for group in one.optimizer.param_groups for p in group["params"])
    return {
        "parameters": sum(p.numel() for p in parameters),
        "whole": _whole(chunks),
        "weights": held,
        "gradients": sum(_bytes(buffer.grad_data) for buffer in buffers),
        "optimizer": elements * (master + 8),
    }


def _whole(chunks: list[Any]) -> int:
    """Elements of everything that a checkpoint would hold of these chunks, at any TP."""
    from megatron_ext.checkpoint.state import model_parts

    sizes = {}
    for _, parts in model_parts(chunks):
        for part in parts:  # layers of one kind share a key, and differ in its first axes
            lead = len(part.shape) - len(part.local_shape)
            sizes[part.key, part.origin[:lead]] = math.prod(part.shape[lead:])
    return sum(sizes.values())


def _bytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * int(tensor.element_size())

"""Bytes that one GPU sends in a step, by axis: volumes, before any time."""

from dataclasses import dataclass

from megatron_ext.plan.layout import BYTES, Layout, Shape


@dataclass(kw_only=True, frozen=True)
class Traffic:
    """Bytes sent by one rank of a middle stage, per step."""

    tp: float
    cp: float
    pp: float
    dp: float


def tensor_parallel(shape: Shape, layout: Layout) -> float:
    """Bytes of one layer's TP collectives for one micro-batch, forward and backward.

    Two all-reduces each way; full recomputation repeats the forward ones. Sequence parallelism
    sends the same in halves (gather, scatter) and gathers two inputs once more in the backward.
    """
    tp = layout.tp
    collectives = 4 + (2 if layout.recompute == "full" else 0)
    if layout.sequence_parallel:
        collectives += 1
    width = BYTES[layout.dtype] * layout.tokens * shape.hidden
    return collectives * 2 * (tp - 1) / tp * width


def context_parallel(shape: Shape, layout: Layout) -> float:
    """Bytes of one layer's key and value ring for one micro-batch: forward, and twice back."""
    channels = 2 * shape.groups * shape.head_dim / layout.tp
    return 3 * (layout.cp - 1) * BYTES[layout.dtype] * layout.tokens * channels


def pipeline(shape: Shape, layout: Layout) -> float:
    """Bytes that a middle stage sends for one micro-batch, both ways."""
    if layout.pp == 1:
        return 0.0
    split = layout.tp if layout.sequence_parallel else 1
    return 2 * layout.vpp * BYTES[layout.dtype] * layout.tokens * shape.hidden / split


def data_parallel(layout: Layout, parameters: float) -> float:
    """Bytes of one step's gradient reduction and parameter gathering."""
    share = (layout.shards - 1) / layout.shards
    gradient = 4 if layout.fp32_gradients else 2
    if not layout.distributed_optimizer:
        return 2 * share * parameters * gradient
    weight = 1 if layout.fp8_weights else BYTES[layout.dtype]
    return share * parameters * (gradient + weight)


def step_traffic(shape: Shape, layout: Layout, parameters: float) -> Traffic:
    """Everything a rank of a middle stage sends in one step."""
    layers = shape.layers / layout.pp
    return Traffic(
        tp=layout.micro_batches * layers * tensor_parallel(shape, layout),
        cp=layout.micro_batches * layers * context_parallel(shape, layout),
        pp=layout.micro_batches * pipeline(shape, layout),
        dp=data_parallel(layout, parameters),
    )

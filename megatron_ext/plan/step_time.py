"""Seconds of one optimizer step, in parts that add up to it."""

import math
from dataclasses import dataclass, replace

from megatron_ext.plan.layer_time import embedding, layer, loss
from megatron_ext.plan.layout import BYTES, Layout, Shape
from megatron_ext.plan.machine import Cost, Machine, Pass
from megatron_ext.plan.memory import stage_parameters


@dataclass(kw_only=True, frozen=True)
class StepTime:
    """Where the seconds of a step go."""

    compute: float
    """Kernels of the slowest stage, recomputation included."""

    tp: float
    """Tensor-parallel collectives that compute waits for, on the slowest stage."""

    cp: float
    """Context-parallel exchange that attention does not hide."""

    pp: float
    """Stage-to-stage transfers that compute waits for."""

    bubble: float
    """Time in which the slowest stage waits for a micro-batch to arrive."""

    dp: float
    """Gradient reduction and parameter gathering that is not hidden."""

    optimizer: float
    host: float

    @property
    def total(self) -> float:
        """The whole step."""
        pipeline = self.compute + self.tp + self.cp + self.pp + self.bubble
        return pipeline + self.dp + self.optimizer + self.host


def stage_passes(machine: Machine, shape: Shape, layout: Layout) -> list[Pass]:
    """Forward and backward of one micro-batch on each stage, all its chunks together."""
    # Everything a layer's time depends on; the rest is blanked so that layouts share the memo.
    key = replace(
        layout,
        world_size=0,
        global_batch=0,
        pp=1,
        vpp=1,
        distributed_optimizer=False,
        overlap_param_gather=False,
        first_stage_layers=None,
        last_stage_layers=None,
    )
    each = layer(machine, shape, key)
    passes = [each.scaled(sum(stage)) for stage in layout.chunk_layers(shape.layers)]
    passes[0] += embedding(machine, shape, key)
    passes[-1] += loss(machine, shape, key)
    return passes


def stage_costs(machine: Machine, shape: Shape, layout: Layout) -> list[Cost]:
    """Both passes of one micro-batch on each stage."""
    return [one.total for one in stage_passes(machine, shape, layout)]


def transfer(machine: Machine, shape: Shape, layout: Layout) -> float:
    """Seconds of one micro-batch's activations from a stage to the next."""
    split = layout.tp
    bytes_ = BYTES[layout.dtype] * layout.tokens * shape.hidden / split
    rate = machine.bandwidth(ranks=2, stride=max(layout.tp * layout.cp * layout.dp, 1))
    return bytes_ / rate + machine.constants.collective_latency


def _pipeline(machine: Machine, shape: Shape, layout: Layout) -> tuple[Cost, float, float]:
    """The slowest stage's work in a step, the transfers it waits for, and its bubble."""
    costs = stage_costs(machine, shape, layout)
    slowest = max(costs, key=lambda cost: cost.total)
    work = slowest.scaled(layout.micro_batches)
    if layout.pp == 1:
        return work, 0.0, 0.0
    idle = (sum(cost.total for cost in costs) - slowest.total) / layout.vpp
    once = transfer(machine, shape, layout)
    exposed = machine.constants.p2p_exposed if layout.vpp == 1 else 0.0
    waits = 2 * once * layout.micro_batches * exposed + 2 * (layout.pp - 1) * once
    return work, waits, idle


def _data_parallel(machine: Machine, layout: Layout, parameters: float) -> float:
    """Exposed seconds of reducing gradients and gathering parameters."""
    ranks = layout.shards
    if ranks == 1:
        return 0.0
    gradient = 4 if layout.fp32_gradients else 2
    share = (ranks - 1) / ranks
    rate = machine.bandwidth(ranks=ranks, stride=layout.tp)
    reduce = gather = share * parameters * gradient / rate
    if layout.distributed_optimizer:
        weight = 1 if layout.fp8_weights else BYTES[layout.dtype]
        gather = share * parameters * weight / rate
    hidden = machine.constants.dp_hidden
    exposed = reduce * (1 - hidden * layout.overlap_grad_reduce)
    if layout.distributed_optimizer:
        exposed += gather * (1 - hidden * layout.overlap_param_gather)
    else:
        exposed += gather * (1 - hidden * layout.overlap_grad_reduce)
    return exposed


def step_time(machine: Machine, shape: Shape, layout: Layout) -> StepTime:
    """Seconds of one step of ``layout``.

    Raises:
        ValueError: the layers do not divide over the stages.
    """
    work, waits, idle = _pipeline(machine, shape, layout)
    parameters = max(stage_parameters(shape, layout))
    owned = parameters / (layout.shards if layout.distributed_optimizer else 1)
    # Adam: gradient, master and moments read, master, moments and weights written, the norm.
    optimizer = machine.stream(38 * owned)
    nodes = max(layout.world_size / machine.gpus_per_node, 1)
    jitter = machine.constants.jitter * math.log2(nodes)
    return StepTime(
        compute=work.compute * (1 + jitter),
        tp=work.tp,
        cp=work.cp,
        pp=waits,
        bubble=idle,
        dp=_data_parallel(machine, layout, parameters),
        optimizer=optimizer,
        host=machine.constants.step_overhead,
    )

"""One layout of one run on one cluster, with everything that the arithmetic says about it."""

from dataclasses import dataclass, replace

from megatron_ext.config import RunConfig
from megatron_ext.plan.constants import FROZEN
from megatron_ext.plan.failures import Losses, losses
from megatron_ext.plan.flops import flops_per_token
from megatron_ext.plan.hardware import hardware, network
from megatron_ext.plan.layout import Layout, Shape
from megatron_ext.plan.machine import Machine
from megatron_ext.plan.memory import GIB, StageMemory, stage_memory
from megatron_ext.plan.step_time import StepTime, step_time

SAVE_BANDWIDTH = 1e9
"""Bytes/s at which one node writes a checkpoint: a modest parallel file system's share."""

HOST_COPY = 10e9
"""Bytes/s at which one GPU's state reaches host memory: what an asynchronous save blocks."""

RESTART = 600.0
"""Seconds from a failure to the next step: noticing it, queueing, importing, loading."""

STORED_BYTES = 14
"""Bytes of a parameter in a checkpoint: 2-byte weight, fp32 master and two moments."""


@dataclass(kw_only=True, frozen=True)
class Site:
    """The part of a cluster that planning reads."""

    hardware: str
    network: str = ""
    gpus_per_node: int = 8
    nodes: int = 1
    price_per_gpu_hour: float = 0.0
    failures_per_gpu_hour: float = 1.97e-5

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node

    def machine(self) -> Machine:
        """Figures of the hardware and the network.

        Raises:
            ValueError: a name without a data file.
        """
        device = hardware(self.hardware)
        return Machine(
            hardware=device,
            network=network(self.network or device.network),
            gpus_per_node=self.gpus_per_node,
            constants=FROZEN,
        )


@dataclass(kw_only=True, frozen=True)
class Verdict:
    """What one layout needs and how fast it goes."""

    layout: Layout
    stages: list[StageMemory]
    capacity: float
    """Bytes of the device."""

    time: StepTime

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        """Whether every stage fits the device."""
        return self.fullest.total <= self.capacity

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second and GPU."""
        tokens = self.layout.global_batch * self.layout.seq_length
        return tokens / self.time.total / self.layout.world_size

    def shortfall(self) -> str:
        """Why it does not fit, in bytes."""
        stage, have = self.fullest, self.capacity / GIB
        return (
            f"out of memory: stage {stage.stage} needs {stage.total / GIB:.1f} of {have:.1f} GiB "
            f"(over by {stage.total - self.capacity:,.0f} bytes)"
        )


def judge(shape: Shape, layout: Layout, machine: Machine) -> Verdict:
    """Memory and time of ``layout``.

    Raises:
        ValueError: the layers do not divide over the stages.
    """
    return Verdict(
        layout=layout,
        stages=stage_memory(shape, layout),
        capacity=machine.hardware.memory_bytes,
        time=step_time(machine, shape, layout),
    )


def fuses(run: RunConfig, machine: Machine) -> bool:
    """Whether norms, rotary positions and SwiGLU are taken as single kernels.

    ``auto`` follows the calibration tables: the SwiGLU rows measured on Ampere ran Megatron-LM of
    2023, without such kernels; those on Hopper ran Transformer Engine.
    """
    if run.kernels.transformer_impl == "auto":
        return machine.hardware.generation != "ampere"
    return run.kernels.transformer_impl == "transformer_engine"


def refuse_precision(run: RunConfig, machine: Machine) -> None:
    """Refuse an FP8 recipe that the hardware does not run.

    Raises:
        ValueError: naming the recipes that it runs.
    """
    known = machine.hardware.fp8_recipes
    if run.precision.fp8 and run.precision.fp8_recipe not in known:
        options = f"use one of {', '.join(known)}" if known else "leave precision.fp8=null"
        raise ValueError(
            f"precision.fp8_recipe={run.precision.fp8_recipe} does not run on "
            f"cluster.hardware={machine.hardware.name}: {options}."
        )


def base_layout(run: RunConfig, site: Site) -> Layout:
    """The run's batch, length, formats and overlap, on every GPU; its axes are not yet checked.

    Raises:
        ValueError: a format that the hardware does not run.
    """
    machine = site.machine()
    refuse_precision(run, machine)
    # A world of one model copy always divides; the search chooses its own axes anyway.
    one = Layout.of(run, run.parallel.model_parallel_size(), fused_kernels=fuses(run, machine))
    return replace(one, world_size=site.gpus)


def judge_run(run: RunConfig, site: Site) -> Verdict:
    """The run as it is configured.

    Raises:
        ValueError: what would stop it, naming the key.
    """
    machine = site.machine()
    refuse_precision(run, machine)
    layout = Layout.of(run, site.gpus, fused_kernels=fuses(run, machine))
    return judge(Shape.of(run.model, layout.tp), layout, machine)


@dataclass(kw_only=True, frozen=True)
class Whole:
    """The whole run, phase by phase, at the layout's speed."""

    steps: int
    tokens: int
    seconds: float
    """Without failures."""

    flops: float
    """Model FLOPs, whole attention square."""

    losses: Losses | None
    save_seconds: float

    def gpu_hours(self, gpus: int) -> float:
        """GPU-hours, expected losses included."""
        return self.wall_seconds * gpus / 3600

    @property
    def wall_seconds(self) -> float:
        """Seconds with the time lost to failures and checkpoints."""
        return self.seconds / (1 - (self.losses.share if self.losses else 0.0))


def whole(run: RunConfig, verdict: Verdict, site: Site) -> Whole:
    """Play every phase's batches and lengths through the step-time model."""
    from megatron_ext.train.phases import Plan

    machine, plan = site.machine(), Plan.of(run)
    shape = Shape.of(run.model, verdict.layout.tp)
    seconds = flops = 0.0
    for phase in plan.phases:
        for steps, size, _ in phase.batches():
            layout = replace(verdict.layout, global_batch=size, seq_length=phase.seq_length)
            seconds += steps * step_time(machine, shape, layout).total
            tokens = steps * size * phase.seq_length
            flops += tokens * flops_per_token(run.model, phase.seq_length)
    total = sum(stage.parameters for stage in verdict.stages) * verdict.layout.tp
    save = STORED_BYTES * total / (SAVE_BANDWIDTH * site.nodes)
    blocking = save
    if run.checkpoint.asynchronous:
        blocking = STORED_BYTES * verdict.fullest.parameters / HOST_COPY
    lost = losses(
        gpus=site.gpus,
        failures_per_gpu_hour=site.failures_per_gpu_hour,
        blocking=blocking,
        restart=RESTART,
    )
    return Whole(
        steps=plan.steps,
        tokens=plan.tokens,
        seconds=seconds,
        flops=flops,
        losses=lost,
        save_seconds=blocking,
    )

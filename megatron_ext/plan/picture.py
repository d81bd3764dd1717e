"""A plan as a picture: memory by stage, and one step of the pipeline over time."""

from pathlib import Path
from typing import Any

from megatron_ext import atomic
from megatron_ext.plan.layout import Shape
from megatron_ext.plan.machine import Machine
from megatron_ext.plan.memory import GIB
from megatron_ext.plan.report import axes
from megatron_ext.plan.schedule import Operation, play
from megatron_ext.plan.step_time import stage_passes
from megatron_ext.plan.verdict import Verdict

HELD = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "margin")
MOST_CHUNKS = 32
"""Passes drawn a stage, each way: enough to see warm-up, steady state and flush."""


def draw(path: Path, verdict: Verdict, shape: Shape, machine: Machine) -> None:
    """Write the picture; its format is the suffix of ``path`` (png, svg, pdf)."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, timeline) = pyplot.subplots(2, 1, figsize=(11, 7), layout="constrained")
    figure.suptitle(f"{axes(verdict.layout)}: {verdict.time.total:.2f} s a step")
    _memory(memory, verdict)
    _timeline(timeline, verdict, shape, machine)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:] or "png", dpi=120)
    pyplot.close(figure)
    atomic.write_bytes(path, drawn.getvalue())


def _memory(plot: Any, verdict: Verdict) -> None:
    stages = [stage.stage for stage in verdict.stages]
    floor = [0.0] * len(stages)
    for name in HELD:
        sizes = [getattr(stage, name) / GIB for stage in verdict.stages]
        plot.bar(stages, sizes, bottom=floor, label=name)
        floor = [below + size for below, size in zip(floor, sizes, strict=True)]
    plot.axhline(verdict.capacity / GIB, color="black", linestyle="--", label="device")
    for stage, height in zip(stages, floor, strict=True) if len(stages) <= 20 else ():
        plot.text(stage, height, f"{height:.1f}", ha="center", va="bottom", fontsize="small")
    plot.set(xlabel="pipeline stage", ylabel="GiB on one GPU", xticks=stages)
    middle, half = (len(stages) - 1) / 2, max(len(stages) / 2 + 0.1, 2)
    plot.set_xlim(middle - half, middle + half)
    plot.set_ylim(0, 1.1 * max(*floor, verdict.capacity / GIB))
    plot.legend(ncols=8, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _timeline(plot: Any, verdict: Verdict, shape: Shape, machine: Machine) -> None:
    layout = verdict.layout
    passes = stage_passes(machine, shape, layout)
    rounds = max(MOST_CHUNKS // (layout.pp * layout.vpp), 2)
    micro = min(layout.micro_batches, rounds * layout.pp)
    edge = 0.3 if micro * layout.vpp <= 2 * MOST_CHUNKS else 0.0  # else edges hide the bars

    def seconds(stage: int, operation: Operation) -> float:
        one = passes[stage]
        piece = one.forward if operation.forward else one.backward
        return piece.total / layout.vpp

    for stage, placed in enumerate(play(layout.pp, layout.vpp, micro, seconds)):
        for forward, color in ((True, "tab:blue"), (False, "tab:orange")):
            bars = [(p.start, p.end - p.start) for p in placed if p.operation.forward == forward]
            plot.broken_barh(
                bars, (stage - 0.4, 0.8), color=color, edgecolor="white", linewidth=edge
            )
    plot.set(xlabel=f"seconds, {micro} of {layout.micro_batches} micro-batches", ylabel="stage")
    plot.set_yticks(range(layout.pp))
    plot.invert_yaxis()
    plot.set_title("forward blue, backward orange", fontsize="small")

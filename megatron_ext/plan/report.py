"""A plan in words, as a table, and as JSON."""

from dataclasses import asdict, replace
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.plan.flops import CONVENTIONS, flops_per_token
from megatron_ext.plan.layout import Layout, Shape
from megatron_ext.plan.machine import Machine
from megatron_ext.plan.memory import GIB
from megatron_ext.plan.parameters import count_parameters
from megatron_ext.plan.search import Found, overrides, why
from megatron_ext.plan.traffic import step_traffic
from megatron_ext.plan.verdict import Site, Verdict, Whole, judge

PARTS = ("compute", "tp", "cp", "pp", "bubble", "dp", "optimizer", "host")
MEANING = {
    "compute": "kernels of the slowest stage",
    "tp": "tensor-parallel collectives, exposed",
    "cp": "context-parallel exchange, exposed",
    "pp": "stage-to-stage transfers, exposed",
    "bubble": "waiting for other stages",
    "dp": "gradients and parameters, exposed",
    "optimizer": "optimizer step",
    "host": "data, logging, barriers",
}
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {"recompute": None}),
    ("selective core_attn", {"recompute": "selective", "recompute_modules": ("core_attn",)}),
    ("selective layernorm", {"recompute": "selective", "recompute_modules": ("layernorm",)}),
    ("selective mlp", {"recompute": "selective", "recompute_modules": ("mlp",)}),
    ("full", {"recompute": "full", "recompute_layers": 1}),
)


def mfu(run: RunConfig, verdict: Verdict, machine: Machine, convention: str) -> float:
    """Model FLOPs over the peak of ``precision.dtype`` (of bf16 for FP8 runs too)."""
    per_token = flops_per_token(run.model, verdict.layout.seq_length, convention=convention)
    return per_token * verdict.tokens_per_second / machine.hardware.peak[verdict.layout.dtype]


def axes(layout: Layout) -> str:
    """TP x PP x ... in short."""
    words = [f"tp{layout.tp}", f"pp{layout.pp}", f"vpp{layout.vpp}" if layout.vpp > 1 else ""]
    words += [
        f"cp{layout.cp}" if layout.cp > 1 else "",
        f"dp{layout.dp}",
        f"mb{layout.micro_batch}",
    ]
    words += [
        "sp" if layout.sequence_parallel else "",
        "zero1" if layout.distributed_optimizer else "",
    ]
    words += [layout.recompute or ""]
    if layout.first_stage_layers is not None or layout.last_stage_layers is not None:
        words += [f"ends {layout.first_stage_layers or '='}/{layout.last_stage_layers or '='}"]
    return " ".join(word for word in words if word)


def _counts(run: RunConfig, verdict: Verdict) -> list[str]:
    count = count_parameters(run.model)
    per_rank = ", ".join(f"{stage.parameters / 1e9:.3f}" for stage in verdict.stages)
    flops = ", ".join(
        f"{flops_per_token(run.model, verdict.layout.seq_length, convention=name) / 1e9:.2f} {name}"
        for name in CONVENTIONS
    )
    return [
        f"parameters      {count.total / 1e9:.3f} B, {count.non_embedding / 1e9:.3f} B without "
        f"embeddings; per rank, stage by stage: {per_rank} B",
        f"GFLOP a token   {flops} (attention square whole, or its causal half)",
    ]


def _memory(verdict: Verdict) -> list[str]:
    head = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "margin")
    lines = [f"memory, GiB of {verdict.capacity / GIB:.1f}"]
    lines += ["stage " + " ".join(f"{name:>11}" for name in head) + f"{'total':>11}"]
    for stage in verdict.stages:
        cells = " ".join(f"{getattr(stage, name) / GIB:>11.2f}" for name in head)
        over = "" if stage.total <= verdict.capacity else "  OUT OF MEMORY"
        lines.append(f"{stage.stage:>5} {cells}{stage.total / GIB:>11.2f}{over}")
    return lines


def settings(run: RunConfig, verdict: Verdict, machine: Machine) -> list[tuple[str, str, Verdict]]:
    """The layout under every schedule and recomputation setting: (schedule, setting, verdict)."""
    shape, layout = Shape.of(run.model, verdict.layout.tp), verdict.layout
    each = run.model.num_layers // layout.pp
    schedules = [1, *[v for v in range(2, each + 1) if layout.pp > 1 and each % v == 0][:4]]
    rows = []
    for chunks in schedules:
        if chunks > 1 and (layout.micro_batches % layout.pp or layout.first_stage_layers):
            continue
        for name, change in SETTINGS:
            schedule = "1F1B" if chunks == 1 else f"interleaved x{chunks}"
            changed = replace(layout, vpp=chunks, **change)
            try:
                rows.append((schedule, name, judge(shape, changed, machine)))
            except ValueError:
                continue
    return rows


def _settings(run: RunConfig, verdict: Verdict, machine: Machine) -> list[str]:
    lines = ["schedule and recomputation: fullest stage, GiB; tokens/s/GPU"]
    for schedule, name, one in settings(run, verdict, machine):
        flag = "" if one.fits else "  OUT OF MEMORY"
        stages = " ".join(f"{stage.total / GIB:.1f}" for stage in one.stages[:8])
        more = " ..." if len(one.stages) > 8 else ""
        lines.append(
            f"  {schedule:<16} {name:<20} {one.tokens_per_second:>8.0f}  "
            f"by stage: {stages}{more}{flag}"
        )
    return lines


def _time(run: RunConfig, verdict: Verdict, machine: Machine) -> list[str]:
    total = verdict.time.total
    lines = [f"step            {total:.3f} s = {verdict.layout.micro_batches} micro-batches"]
    for part in PARTS:
        seconds = getattr(verdict.time, part)
        if seconds:
            lines.append(
                f"  {part:<12}  {seconds:>9.3f} s {seconds / total:>6.1%}  {MEANING[part]}"
            )
    shares = ", ".join(f"{mfu(run, verdict, machine, name):.1%} {name}" for name in CONVENTIONS)
    lines.append(f"throughput      {verdict.tokens_per_second:.0f} tokens/s/GPU; MFU {shares}")
    if verdict.layout.fp8:
        lines.append(
            "  FP8 speeds up the block linears only; attention, logits, norms and optimizer "
            f"stay in {verdict.layout.dtype}. MFU is against the {verdict.layout.dtype} peak."
        )
    return lines


def _traffic(run: RunConfig, verdict: Verdict) -> str:
    shape = Shape.of(run.model, verdict.layout.tp)
    sent = step_traffic(shape, verdict.layout, verdict.fullest.parameters)
    words = [f"{name} {amount / GIB:.2f}" for name, amount in vars(sent).items() if amount]
    return f"sent a step     {', '.join(words) or 'nothing'} GiB per GPU"


def _run(whole: Whole, site: Site) -> list[str]:
    days, hours = whole.wall_seconds / 86400, whole.gpu_hours(site.gpus)
    lines = [
        f"run             {whole.tokens / 1e9:,.0f} B tokens, {whole.steps:,} steps: "
        f"{whole.seconds / 86400:.2f} days without failures, {days:.2f} with, "
        f"{hours:,.0f} GPU-hours"
    ]
    if site.price_per_gpu_hour:
        lines.append(f"cost            {hours * site.price_per_gpu_hour:,.0f}")
    if whole.losses:
        lost = whole.losses
        lines.append(
            f"failures        one per {lost.mean_between_failures / 3600:.1f} h; save every "
            f"{lost.interval / 60:.0f} min (Daly: sqrt(2 d M)(1 + sqrt(d/2M)/3 + d/18M) - d, "
            f"d = {whole.save_seconds:.1f} s, M = {lost.mean_between_failures:.0f} s); "
            f"{lost.share:.2%} of the time is lost"
        )
        steps = max(1, round(lost.interval / (whole.seconds / whole.steps)))
        lines.append(f"                checkpoint.interval_steps={steps}")
    return lines


def text(run: RunConfig, verdict: Verdict, whole: Whole, site: Site) -> str:
    """The plan of a run as it is configured."""
    machine = site.machine()
    lines = [
        f"{run.name}: {axes(verdict.layout)} on {site.gpus} x {site.hardware}, "
        f"{machine.network.name}"
    ]
    lines += [*_counts(run, verdict), "", *_memory(verdict), ""]
    lines += [*_settings(run, verdict, machine), ""]
    lines += [*_time(run, verdict, machine), _traffic(run, verdict), "", *_run(whole, site)]
    if not verdict.fits:
        lines += ["", verdict.shortfall()]
    return "\n".join(lines)


def table(found: Found, top: int) -> str:
    """The best layouts, the nearest that do not fit, and why combinations were refused."""
    if not found.ranked:
        nearest = found.out_of_memory[:1]
        return f"nothing fits; nearest: {axes(nearest[0].layout)}: {why(nearest[0], nearest[0])}"
    best = found.ranked[0]
    lines = [
        f"{found.considered} legal layouts: {len(found.ranked)} fit, "
        f"{len(found.out_of_memory)} do not",
        f"{'layout':<42} {'step s':>8} {'tok/s/GPU':>10} {'GiB':>6}  why",
    ]
    chosen = found.ranked[:top] + found.out_of_memory[: max(3, top // 4)]
    for one in chosen:
        lines.append(
            f"{axes(one.layout):<42} {one.time.total:>8.3f} {one.tokens_per_second:>10.0f} "
            f"{one.fullest.total / GIB:>6.1f}  {why(one, best)}"
        )
    for reason, count in sorted(found.refused.items(), key=lambda item: -item[1]):
        lines.append(f"refused {count}: {reason}")
    lines += ["", "best, to paste:", "  " + " ".join(overrides(best.layout))]
    return "\n".join(lines)


def as_data(run: RunConfig, verdict: Verdict, machine: Machine) -> dict[str, Any]:
    """One verdict as plain data: bytes, seconds, overrides."""
    stages = [asdict(stage) | {"total": stage.total} for stage in verdict.stages]
    return {
        "layout": asdict(verdict.layout),
        "overrides": overrides(verdict.layout),
        "fits": verdict.fits,
        "capacity_bytes": verdict.capacity,
        "stages": stages,
        "seconds": asdict(verdict.time) | {"total": verdict.time.total},
        "tokens_per_second_per_gpu": verdict.tokens_per_second,
        "mfu": {name: mfu(run, verdict, machine, name) for name in CONVENTIONS},
    }


def plan_data(run: RunConfig, verdict: Verdict, whole: Whole, site: Site) -> dict[str, Any]:
    """``text`` as plain data."""
    length = verdict.layout.seq_length
    return as_data(run, verdict, site.machine()) | {
        "name": run.name,
        "site": asdict(site),
        "parameters": count_parameters(run.model).total,
        "non_embedding_parameters": count_parameters(run.model).non_embedding,
        "flops_per_token": {
            name: flops_per_token(run.model, length, convention=name) for name in CONVENTIONS
        },
        "run": asdict(whole)
        | {"wall_seconds": whole.wall_seconds, "gpu_hours": whole.gpu_hours(site.gpus)},
    }


def search_data(run: RunConfig, found: Found, site: Site, top: int) -> dict[str, Any]:
    """``table`` as plain data, every loser with its reason."""
    machine = site.machine()
    best = (found.ranked or found.out_of_memory)[0]
    every = found.ranked[:top] + found.out_of_memory[:top]
    return {
        "considered": found.considered,
        "fit": len(found.ranked),
        "refused": found.refused,
        "layouts": [as_data(run, one, machine) | {"why": why(one, best)} for one in every],
    }

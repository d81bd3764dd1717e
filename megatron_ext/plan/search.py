"""Every legal layout of a model on a cluster, fastest first, and why each other one loses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from megatron_ext.legal import divisors
from megatron_ext.models.config import ModelConfig
from megatron_ext.plan.layout import Layout, Shape
from megatron_ext.plan.machine import Machine
from megatron_ext.plan.verdict import Verdict, judge

MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTE = (None, "selective", "full")


@dataclass
class Found:
    """The outcome of a search."""

    ranked: list[Verdict] = field(default_factory=list)
    """Layouts that fit, fastest first."""

    out_of_memory: list[Verdict] = field(default_factory=list)
    """Layouts that do not, nearest to fitting first."""

    refused: dict[str, int] = field(default_factory=dict)
    """Why combinations are not legal, and how many each reason refuses."""

    @property
    def considered(self) -> int:
        """Layouts whose memory and time were worked out."""
        return len(self.ranked) + len(self.out_of_memory)


def why(verdict: Verdict, best: Verdict) -> str:
    """What a layout loses to ``best``, in its largest part."""
    if not verdict.fits:
        return verdict.shortfall()
    if verdict is best:
        return "fastest that fits"
    parts = {
        name: getattr(verdict.time, name) - getattr(best.time, name)
        for name in ("compute", "tp", "cp", "pp", "bubble", "dp", "optimizer")
    }
    most = max(parts, key=lambda name: parts[name])
    words = {
        "compute": "kernels (recomputation or narrower matmuls)",
        "tp": "tensor-parallel collectives",
        "cp": "context-parallel exchange",
        "pp": "stage-to-stage transfers",
        "bubble": "pipeline bubble",
        "dp": "gradient and parameter traffic",
        "optimizer": "optimizer",
    }
    slower = verdict.time.total / best.time.total - 1
    return f"{100 * slower:.1f} % slower: +{parts[most]:.2f} s {words[most]}"


def _stages(model: ModelConfig, layout: Layout) -> Iterator[Layout]:
    """The even split, and first and last stages lighter by a layer or two."""
    yield layout
    if layout.pp < 3 or layout.vpp > 1:
        return
    for first, last in ((0, 1), (1, 1), (0, 2), (1, 2)):
        rest = model.num_layers + first + last
        if rest % layout.pp:
            continue
        each = rest // layout.pp
        if each > max(first, last):
            yield replace(
                layout,
                first_stage_layers=each - first if first else None,
                last_stage_layers=each - last,
            )


def _vpp(model: ModelConfig, pp: int) -> list[int]:
    if pp == 1 or model.num_layers % pp:
        return [1]
    return [v for v in divisors(model.num_layers // pp) if v <= 8]


def layouts(model: ModelConfig, base: Layout, machine: Machine, found: Found) -> Iterator[Layout]:
    """Every combination that Megatron accepts; refusals are counted in ``found``."""
    world, most_tp = base.world_size, machine.gpus_per_node

    def refuse(reason: str) -> None:
        found.refused[reason] = found.refused.get(reason, 0) + 1

    tps = [tp for tp in divisors(most_tp) if world % tp == 0]
    for tp, pp, cp in product(tps, divisors(world), (1, 2, 4, 8)):
        if world % (tp * pp * cp):
            refuse("tp*pp*cp does not divide the world size")
        elif model.num_attention_heads % tp or model.query_groups() % tp:
            refuse("heads or KV heads do not divide over TP")
        elif model.ffn_hidden_size % tp:
            refuse("the feed-forward width does not divide over TP")
        elif pp > model.num_layers:
            refuse("more stages than layers")
        elif base.seq_length % (2 * cp) and cp > 1:
            refuse("the sequence does not divide into 2 x CP slices")
        elif cp > 1 and base.seq_length < 8192 and cp * 4096 > 2 * base.seq_length:
            refuse("context parallelism of a sequence that is short already")
        else:
            axes = replace(base, tp=tp, pp=pp, cp=cp, sequence_parallel=False)
            yield from _fed(model, axes, refuse)


def _fed(model: ModelConfig, axes: Layout, refuse: Callable[[str], None]) -> Iterator[Layout]:
    """Micro-batches, chunks, recomputation and optimizer of one choice of axes."""
    modes = [False, True] if axes.tp > 1 else [False]
    sharded = [True, False] if axes.shards > 1 else [False]
    for micro, vpp in product(MICRO_BATCHES, _vpp(model, axes.pp)):
        if axes.global_batch % (axes.dp * micro):
            refuse("the global batch does not divide over DP x micro-batch")
            continue
        fed = replace(axes, micro_batch=micro, vpp=vpp, first_stage_layers=None)
        fed = replace(fed, last_stage_layers=None)
        if vpp > 1 and fed.micro_batches % fed.pp:
            refuse("interleaving needs micro-batches in multiples of the stages")
            continue
        for sp, zero, recompute in product(modes, sharded, RECOMPUTE):
            layout = replace(
                fed,
                sequence_parallel=sp,
                distributed_optimizer=zero,
                recompute=recompute,
                overlap_param_gather=axes.overlap_param_gather and zero,
            )
            yield from _stages(model, layout)


def search(
    model: ModelConfig, base: Layout, machine: Machine, *, only_micro_batch: int | None = None
) -> Found:
    """Work out every legal layout with ``base``'s batch, length, formats and overlap."""
    found = Found()
    shapes = {tp: Shape.of(model, tp) for tp in divisors(machine.gpus_per_node)}
    for layout in layouts(model, base, machine, found):
        if only_micro_batch not in (None, layout.micro_batch):
            continue
        try:
            verdict = judge(shapes[layout.tp], layout, machine)
        except ValueError:
            reason = "the layers do not divide over the stages"
            found.refused[reason] = found.refused.get(reason, 0) + 1
            continue
        (found.ranked if verdict.fits else found.out_of_memory).append(verdict)
    found.ranked.sort(key=lambda verdict: verdict.time.total)
    found.out_of_memory.sort(key=lambda verdict: verdict.fullest.total)
    return found


def overrides(layout: Layout) -> list[str]:
    """The layout as Hydra overrides to paste after ``recipe=`` and ``cluster=``."""

    def word(value: object) -> str:
        return "null" if value is None else str(value).lower()

    return [
        f"parallel.tensor_model_parallel_size={layout.tp}",
        f"parallel.pipeline_model_parallel_size={layout.pp}",
        "parallel.virtual_pipeline_model_parallel_size="
        + word(layout.vpp if layout.vpp > 1 else None),
        f"parallel.context_parallel_size={layout.cp}",
        f"parallel.sequence_parallel={word(layout.sequence_parallel)}",
        f"parallel.use_distributed_optimizer={word(layout.distributed_optimizer)}",
        f"parallel.recompute_granularity={word(layout.recompute)}",
        f"parallel.num_layers_in_first_pipeline_stage={word(layout.first_stage_layers)}",
        f"parallel.num_layers_in_last_pipeline_stage={word(layout.last_stage_layers)}",
        f"parallel.overlap_param_gather={word(layout.overlap_param_gather)}",
        f"batch.micro_batch_size={layout.micro_batch}",
    ]

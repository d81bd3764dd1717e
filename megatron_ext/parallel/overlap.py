"""Hiding communication and saving memory: each setting by name, with its rule, gain and cost.

``check`` refuses a combination that Megatron would refuse after the queue, or run slowly without a
word. Nothing here needs torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_ext.config import RunConfig

ORDERS = ("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp")
CP_COMM_TYPES = ("p2p", "all_gather", "a2a")
RECOMPUTABLE = ("core_attn", "layernorm", "mlp")


@dataclass(frozen=True)
class Choice:
    """One setting: what it buys, what it costs, and when it is illegal."""

    key: str
    """Dotted path that a person types."""

    gain: str
    cost: str
    rule: Callable[[RunConfig], str]
    """Why this run cannot have it, as the end of a sentence; empty when it can."""

    def value(self, run: RunConfig) -> Any:
        """What the run asks for."""
        part, _, name = self.key.partition(".")
        return getattr(getattr(run, part), name)


def _tp_comm_overlap(run: RunConfig) -> str:
    parallel, lengths = run.parallel, {p.seq_length or run.batch.seq_length for p in run.phases}
    if not parallel.sequence_parallel:
        return "needs parallel.sequence_parallel=true (and so TP of at least 2)"
    if run.kernels.transformer_impl == "local":
        return "needs Transformer Engine, and kernels.transformer_impl=local leaves it out"
    if len(lengths) > 1:
        return (
            f"has buffers of one size, and the phases have sequences of "
            f"{', '.join(map(str, sorted(lengths)))} tokens: run them as separate jobs"
        )
    return ""


def _overlap_param_gather(run: RunConfig) -> str:
    if not run.parallel.use_distributed_optimizer:
        return "needs parallel.use_distributed_optimizer=true"
    if not run.parallel.overlap_grad_reduce:
        return "needs parallel.overlap_grad_reduce=true: Megatron shares their buckets"
    return ""


def _recompute(run: RunConfig) -> str:
    parallel, precision = run.parallel, run.precision
    if parallel.recompute_granularity == "full":
        first = min(n for n in parallel.layers_per_stage(run.model.num_layers) if n)
        chunk = first // (parallel.virtual_pipeline_model_parallel_size or 1)
        if not 1 <= parallel.recompute_num_layers <= chunk:
            return (
                f"needs parallel.recompute_num_layers={parallel.recompute_num_layers} between 1 "
                f"and the {chunk} layers of one pipeline chunk"
            )
        return ""
    unknown = [m for m in parallel.recompute_modules if m not in RECOMPUTABLE]
    if unknown or not parallel.recompute_modules:
        return (
            f"recomputes parallel.recompute_modules={parallel.recompute_modules}: choose from "
            f"{', '.join(RECOMPUTABLE)}"
        )
    if "layernorm" in parallel.recompute_modules and precision.word() == "fp8_delayed":
        return (
            "cannot recompute layernorm under precision.fp8_recipe=delayed, whose history would "
            "count it twice: leave it out of parallel.recompute_modules, or use "
            "precision=fp8_current"
        )
    return ""


def _context_parallel(run: RunConfig) -> str:
    cp, kind = run.parallel.context_parallel_size, run.parallel.cp_comm_type
    if cp == 1:
        return ""
    if kind not in CP_COMM_TYPES:
        return f"with parallel.cp_comm_type={kind}: choose one of {', '.join(CP_COMM_TYPES)}"
    if run.kernels.transformer_impl == "local":
        return "needs Transformer Engine, and kernels.transformer_impl=local leaves it out"
    if run.kernels.attention_backend == "unfused":
        return "needs a flash or fused kernel, not kernels.attention_backend=unfused"
    heads, tp = run.model.query_groups(), run.parallel.tensor_model_parallel_size
    if kind == "a2a" and (heads // tp) % cp:
        return (
            f"with parallel.cp_comm_type=a2a shares KV heads out over CP: {heads} groups / TP {tp} "
            f"= {heads // tp} is not a multiple of {cp}; use p2p"
        )
    return _packed_context(run)


def _packed_context(run: RunConfig) -> str:
    packed = [n for n, phase in enumerate(run.phases) if phase.packing == "document"]
    if packed:
        return (
            f"would cut documents whose lengths are not multiples of 2 * CP = "
            f"{2 * run.parallel.context_parallel_size}, so phases.{packed[0]}.packing=document "
            f"cannot be isolated: use 1, or packing=crossdoc"
        )
    return ""


def _order(run: RunConfig) -> str:
    known = run.parallel.order in ORDERS
    return "" if known else f"is not one of {', '.join(ORDERS)}: TP must stay innermost"


def _never(run: RunConfig) -> str:
    return ""


CHOICES = (
    Choice(
        "parallel.sequence_parallel",
        "activations between TP regions shrink by TP; the traffic stays the same",
        "nothing at TP >= 2",
        _never,  # ParallelConfig.check knows its rule
    ),
    Choice(
        "parallel.tp_comm_overlap",
        "TP traffic hides behind the matmuls",
        "buffers of micro_batch * seq * hidden per layer kind; NVLink multicast, or UB_SKIPMC=1",
        _tp_comm_overlap,
    ),
    Choice(
        "parallel.overlap_grad_reduce",
        "gradient reduction hides behind the backward pass",
        "some streaming multiprocessors go to NCCL",
        _never,
    ),
    Choice(
        "parallel.overlap_param_gather",
        "parameter gathering hides behind the next forward pass",
        "one gathered bucket ahead in memory",
        _overlap_param_gather,
    ),
    Choice(
        "parallel.recompute_granularity",
        "selective drops attention's or the MLP's activations; full keeps one tensor a layer",
        "selective computes the named modules twice; full a whole forward pass, a third more work",
        _recompute,
    ),
    Choice(
        "parallel.context_parallel_size",
        "sequences longer than one GPU holds",
        "key and value traffic every layer",
        _context_parallel,
    ),
    Choice(
        "parallel.order",
        "pipeline neighbours in one node where the network between nodes is slow",
        "data-parallel traffic then crosses nodes",
        _order,
    ),
    Choice(
        "parallel.use_sharp",
        "switches reduce gradients",
        "needs InfiniBand with SHARP; without it NCCL says so and goes on",
        _never,
    ),
    Choice(
        "parallel.manual_gc_interval",
        "no rank waits for another's garbage collection",
        "memory of unreachable cycles stays until the next collection",
        _never,
    ),
    Choice(
        "kernels.gradient_accumulation_fusion",
        "one pass less over every weight gradient",
        "needs apex's extension",
        _never,  # whether the extension is there is asked where the run starts
    ),
)


def check(run: RunConfig) -> None:
    """Refuse overlap and memory settings that cannot work together.

    Raises:
        ValueError: the setting, its value, the rule and the way out.
    """
    for choice in CHOICES:
        value = choice.value(run)
        if value and (broken := choice.rule(run)):
            shown = str(value).lower() if isinstance(value, bool) else value
            raise ValueError(f"{choice.key}={shown} {broken}.")


def environment(run: RunConfig, *, capability: tuple[int, int] | None) -> dict[str, str]:
    """Variables that must be set before CUDA starts, for a device of this capability.

    ``CUDA_DEVICE_MAX_CONNECTIONS=1`` puts kernels into one hardware queue in the order they were
    launched: Megatron's TP and CP overlap counts on a collective being scheduled before the
    matmul that hides it. Blackwell orders streams by priority instead and does not need it.
    """
    variables: dict[str, str] = {}
    parallel = run.parallel
    overlapping = parallel.sequence_parallel or parallel.context_parallel_size > 1
    if capability is not None and capability < (10, 0) and overlapping:
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if capability is not None:
        variables["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return variables


def topology_warnings(run: RunConfig, *, gpus_per_node: int) -> list[str]:
    """What is legal and slow about the layout on nodes of this size, one sentence each."""
    tp, cp = run.parallel.tensor_model_parallel_size, run.parallel.context_parallel_size
    if gpus_per_node < 1:
        return []
    found = []
    if gpus_per_node % tp:
        found.append(
            f"parallel.tensor_model_parallel_size={tp} does not divide the {gpus_per_node} GPUs of "
            f"a node, so some TP groups cross nodes and every layer waits for the network."
        )
    elif gpus_per_node % (tp * cp) and (tp * cp) % gpus_per_node:
        found.append(
            f"tp * cp = {tp} * {cp} = {tp * cp} neither divides nor is a multiple of the "
            f"{gpus_per_node} GPUs of a node: context-parallel rings straddle nodes unevenly."
        )
    return found

"""Bytes on one GPU of each pipeline stage, by what they hold."""

from dataclasses import dataclass

from megatron_ext.plan.layout import BYTES, Layout, Shape
from megatron_ext.plan.schedule import held_in_closed_form

GIB = 2**30

WORKSPACE = 0.1 * GIB
"""cuBLAS and Transformer Engine workspaces that PyTorch's allocator sees."""

CONTEXT = 0.6 * GIB
"""CUDA context and loaded kernels (Fujii et al., arXiv:2411.06465: 0.3 to 0.5 GB, newer more)."""

COMMUNICATOR = 0.4 * GIB
"""NCCL buffers of one process group that spans GPUs (the same source: 0.5 to several GB)."""

FRAGMENTATION = 0.04
"""Share of activations and buffers lost between the allocator's blocks."""


@dataclass(kw_only=True, frozen=True)
class StageMemory:
    """One GPU of one stage, in bytes."""

    stage: int
    parameters: float
    """How many, not bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Of every micro-batch in flight."""

    logits: float
    buffers: float
    """Gradients of activations, recomputed blocks, messages and workspaces."""

    margin: float
    """What PyTorch's allocator does not show: context, NCCL, fragmentation."""

    @property
    def static(self) -> float:
        """What stays between steps: what Megatron logs as allocated."""
        return self.weights + self.gradients + self.optimizer + WORKSPACE

    @property
    def peak(self) -> float:
        """What PyTorch's allocator reaches: what Megatron logs as max allocated."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.activations + self.logits + self.buffers

    @property
    def total(self) -> float:
        """What the device must hold."""
        return self.peak + self.margin


def stage_parameters(shape: Shape, layout: Layout) -> list[float]:
    """Parameters on one rank of each stage."""
    vectors = 2 * shape.norm_vectors * shape.hidden
    heads = (shape.heads + 2 * shape.groups) * shape.head_dim
    split = heads if shape.qkv_bias or shape.linear_bias else 0
    if shape.linear_bias:
        split += (2 if shape.gated else 1) * shape.ffn
        vectors += 2 * shape.hidden
    each = (shape.layer_matmul() + split) / layout.tp + vectors
    counts = [sum(stage) * each for stage in layout.chunk_layers(shape.layers)]
    rows = shape.vocab * shape.hidden / layout.tp
    counts[0] += rows + shape.positions * shape.hidden
    if not shape.tied or layout.pp > 1:
        counts[-1] += rows
    counts[-1] += shape.norm_vectors * shape.hidden
    return counts


def state_bytes(layout: Layout) -> tuple[float, float, float]:
    """Bytes of a parameter's weight, gradient and optimizer state: 6 + 12/d and its relatives."""
    weight = BYTES[layout.dtype]
    gradient = 4 if layout.fp32_gradients else 2
    # fp32 master and two moments; fp32 weights are their own master; 2-byte gradients are copied
    # to fp32 for the update.
    state = 8 if weight == 4 else 12
    if weight == 2 and not layout.fp32_gradients:
        state += 4
    return weight, gradient, state / (layout.shards if layout.distributed_optimizer else 1)


def layer_activations(shape: Shape, layout: Layout) -> float:
    """Bytes of one layer's saved activations for one micro-batch, nothing recomputed."""
    h, width = shape.hidden, BYTES[layout.dtype]
    modules = layout.recompute_modules if layout.recompute == "selective" else ()
    queries, keys = shape.heads * shape.head_dim, 2 * shape.groups * shape.head_dim
    linear = 1 if layout.fp8 else width  # FP8 keeps the quantised input of a linear layer
    # Whole on every TP rank unless sequence parallelism splits it: the inputs of both norms, what
    # the norms hand to the linears, dropout masks.
    whole = 2 * width * h + (2 * h if shape.dropout else 0)
    whole += 0 if "layernorm" in modules else 2 * linear * h
    if not layout.fused_kernels:
        whole += 2 * width * h  # the normalised value before its weight, in both norms
    # Split by TP: queries, keys, values, the attention's output, what surrounds the activation.
    split = width * (queries + keys) + width * queries + (queries if layout.fp8 else 0)
    if "mlp" not in modules:
        split += (2 if shape.gated else 1) * width * shape.ffn + linear * shape.ffn
    bytes_ = whole / (layout.tp if layout.sequence_parallel else 1) + split / layout.tp
    bytes_ *= layout.tokens
    if not layout.flash_attention and "core_attn" not in modules:
        scores = layout.micro_batch * shape.heads * layout.seq_length**2 / layout.cp
        # softmax output; with dropout its mask and output too
        bytes_ += (2 * width + 1 if shape.dropout else width) * scores / layout.tp
    return bytes_


def kept_activations(shape: Shape, layout: Layout) -> float:
    """Bytes of one layer that stay from its forward to its backward."""
    if layout.recompute != "full":
        return layer_activations(shape, layout)
    split = layout.tp if layout.sequence_parallel else 1
    inputs = BYTES[layout.dtype] * layout.tokens * shape.hidden / split
    return inputs / layout.recompute_layers


def _in_flight(shape: Shape, layout: Layout, stage: int) -> float:
    """Layers whose activations the stage holds at once."""
    chunks = layout.chunk_layers(shape.layers)[stage]
    if layout.pp == 1:
        return sum(chunks)
    held = held_in_closed_form(stage, layout.pp, layout.vpp, layout.micro_batches)
    return held * sum(chunks) / layout.vpp


def _buffers(shape: Shape, layout: Layout) -> float:
    """Bytes that live only while a layer is computed."""
    width, tp = BYTES[layout.dtype], layout.tp
    split = tp if layout.sequence_parallel else 1
    hidden = width * layout.tokens * shape.hidden
    wide = width * layout.tokens * (2 if shape.gated else 1) * shape.ffn / tp
    transient = hidden + wide
    if layout.recompute == "full":
        transient += layout.recompute_layers * layer_activations(shape, layout)
    elif layout.recompute == "selective" and "mlp" in layout.recompute_modules:
        transient += 1.5 * wide
    if layout.pp > 1:
        transient += 2 * hidden / split
    return transient + WORKSPACE


def _logits(shape: Shape, layout: Layout) -> float:
    """Bytes of the logits at the loss: 2-byte, and their fp32 copy that becomes the gradient."""
    rows = layout.tokens * shape.vocab / layout.tp
    return (BYTES[layout.dtype] + 4) * rows


def _margin(layout: Layout, transient: float) -> float:
    groups = sum(size > 1 for size in (layout.tp, layout.cp, layout.pp, layout.dp))
    return CONTEXT + COMMUNICATOR * groups + FRAGMENTATION * transient


def stage_memory(shape: Shape, layout: Layout) -> list[StageMemory]:
    """Memory of one GPU of every stage.

    Raises:
        ValueError: the layers do not divide over the stages.
    """
    weight, gradient, state = state_bytes(layout)
    stages = []
    for stage, parameters in enumerate(stage_parameters(shape, layout)):
        layers = sum(layout.chunk_layers(shape.layers)[stage])
        linears = layers * shape.layer_matmul() / layout.tp
        held = weight * parameters
        if layout.fp8:  # quantised copies for the matmuls, and their transposes on Hopper
            held += (0 if layout.fp8_weights else 2) * linears
        activations = _in_flight(shape, layout, stage) * kept_activations(shape, layout)
        last = stage == layout.pp - 1
        if shape.dropout and stage == 0:
            activations += layout.tokens * shape.hidden * min(layout.pp, layout.micro_batches)
        if last:
            activations += 2 * BYTES[layout.dtype] * layout.tokens * shape.hidden
        logits = _logits(shape, layout) if last else 0.0
        buffers = _buffers(shape, layout)
        # The loss comes before the first backward: its peak and a block's do not coincide.
        if last:
            logits = max(logits - buffers + WORKSPACE, 0.0)
        stages.append(
            StageMemory(
                stage=stage,
                parameters=parameters,
                weights=held,
                gradients=gradient * parameters,
                optimizer=state * parameters,
                activations=activations,
                logits=logits,
                buffers=buffers,
                margin=_margin(layout, activations + logits + buffers),
            )
        )
    return stages

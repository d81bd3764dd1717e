"""Seconds of one decoder layer, one embedding and one loss, for one micro-batch on one rank.

A roofline in which what does not overlap adds up: a matmul costs its FLOPs at the sustained rate
plus its operands' HBM traffic, so that narrow ones are less efficient; element-wise kernels cost
their bytes; collectives their bytes on the links they cross; every kernel a gap.
"""

import math
from functools import lru_cache

from megatron_ext.plan.layout import BYTES, Layout, Shape
from megatron_ext.plan.machine import Cost, Machine, Pass


def matmul(
    machine: Machine, m: float, n: float, k: float, *, format: str, passes: int = 1
) -> float:
    """Seconds of an m x k by k x n product."""
    constants = machine.constants
    tiles = -(-m // 256) * -(-n // 128) / machine.hardware.multiprocessors
    waves = 1 + constants.wave_quantisation * (math.ceil(tiles) / tiles - 1)
    fill = 1 + constants.tile_fill / k
    compute = 2 * m * n * k / machine.matmul_rate(format) * waves * fill
    width = 1 if format == "fp8" else BYTES[format]
    operands = width * (m * k + k * n) + 2 * m * n
    traffic = constants.operand_traffic * operands / machine.hardware.memory_bandwidth
    return passes * (compute + traffic + constants.kernel_gap)


def _linears(machine: Machine, shape: Shape, layout: Layout) -> tuple[float, float]:
    """Forward and backward seconds of the four block linears."""
    tokens, tp = layout.tokens, layout.tp
    wide = (2 if shape.gated else 1) * shape.ffn
    heads = (shape.heads + 2 * shape.groups) * shape.head_dim
    sizes = (
        (heads / tp, shape.hidden),
        (shape.hidden, shape.heads * shape.head_dim / tp),
        (wide / tp, shape.hidden),
        (shape.hidden, shape.ffn / tp),
    )
    format = "fp8" if layout.fp8 else layout.dtype
    forward = backward = 0.0
    for n, k in sizes:
        forward += matmul(machine, tokens, n, k, format=format)
        backward += matmul(machine, tokens, k, n, format=format)
        backward += matmul(machine, n, k, tokens, format=format)
        # The weight gradient is added to the fp32 main gradient: read and write 4 bytes.
        backward += machine.stream(n * k * (8 if layout.fp32_gradients else 4))
        if layout.fp8:
            forward += machine.stream(machine.constants.fp8_cast_bytes * tokens * k)
            backward += machine.stream(machine.constants.fp8_cast_bytes * tokens * n)
            forward += machine.stream(machine.constants.fp8_cast_bytes * n * k)
    return forward, backward


def _attention(machine: Machine, shape: Shape, layout: Layout) -> tuple[float, float]:
    """Forward and backward seconds of the core attention."""
    heads, b = shape.heads / layout.tp, layout.micro_batch
    queries, keys = layout.seq_length / layout.cp, layout.seq_length
    gap = machine.constants.kernel_gap
    if layout.flash_attention:
        # Half of the square; the backward recomputes the scores: 5 products for 2.
        flops = 4 * b * heads * queries * keys * shape.head_dim / 2
        rate = machine.matmul_rate(layout.dtype) * machine.constants.flash_attention
        if layout.cp > 1:
            rate *= machine.constants.ring_attention
        return flops / rate + gap, 2.5 * flops / rate + 3 * gap
    product = (
        b * heads * matmul(machine, int(queries), keys, shape.head_dim, format=layout.dtype)
        - (b * heads - 1) * gap
    )
    scores = b * heads * queries * keys
    drop = 1 if shape.dropout else 0
    # The fused causal softmax reads half of the square and writes all of it.
    forward = 2 * product + machine.stream(scores * (3 + 5 * drop)) + 2 * gap
    backward = 4 * product + machine.stream(scores * (4 + 5 * drop)) + 2 * gap
    return forward, backward


def _elementwise(machine: Machine, shape: Shape, layout: Layout) -> tuple[float, float]:
    """Forward and backward seconds of norms, residuals, activation and rotary positions."""
    h, tp, fused = shape.hidden, layout.tp, layout.fused_kernels
    split = tp if layout.sequence_parallel else 1
    drop = 1 if shape.dropout else 0
    # Bytes a channel, 2-byte activations. One fused kernel reads its inputs and writes its output
    # once. Written as separate operations (Megatron-LM of 2023) an RMSNorm in fp32 moves 36 forward
    # and 76 backward, a rotary embedding 20 each way, a SwiGLU 10 and 26.
    norm, norm_back = (4, 6) if fused else (36, 76)
    forward = (2 * norm + 2 * (6 + drop)) * h / split
    backward = (2 * norm_back + 2 * 6 + 2 * 5 * drop) * h / split
    activation, activation_back = (6, 10) if shape.gated else (4, 6)
    if shape.gated and not fused:
        activation, activation_back = 10, 26
    forward += activation * shape.ffn / tp
    backward += activation_back * shape.ffn / tp
    if shape.rotary:
        rotated = (shape.heads + shape.groups) * shape.head_dim / tp
        forward += (4 if fused else 20) * rotated
        backward += (4 if fused else 20) * rotated
    if layout.cp > 1:
        # Each step of the ring rescales and adds an fp32 output, and fp32 gradients.
        channels = shape.heads * shape.head_dim / tp
        forward += 12 * layout.cp * channels
        backward += 12 * layout.cp * channels
    gap = machine.constants.kernel_gap
    tokens = layout.tokens
    return (
        machine.stream(tokens * forward) + (8 if fused else 30) * gap,
        machine.stream(tokens * backward) + (12 if fused else 40) * gap,
    )


def _tensor_parallel(machine: Machine, shape: Shape, layout: Layout) -> tuple[float, float]:
    """Exposed forward and backward seconds of a layer's TP collectives."""
    tp = layout.tp
    if tp == 1:
        return 0.0, 0.0
    constants = machine.constants
    bytes_ = 2 * layout.tokens * shape.hidden * 2 * (tp - 1) / tp
    once = bytes_ / machine.bandwidth(ranks=tp, stride=1) + constants.collective_latency
    forward = 2 * once
    # With sequence parallelism the two column-parallel inputs are gathered once more.
    backward = (3 if layout.sequence_parallel else 2) * once * (1 - constants.tp_backward_hidden)
    if layout.tp_comm_overlap:
        forward *= 1 - constants.tp_overlap_hidden
        backward = 2 * once * (1 - constants.tp_overlap_hidden)
    return forward, backward


def _context_parallel(machine: Machine, shape: Shape, layout: Layout) -> tuple[float, float]:
    """Seconds of a layer's key and value ring, before attention hides it."""
    cp = layout.cp
    if cp == 1:
        return 0.0, 0.0
    channels = 2 * shape.groups * shape.head_dim / layout.tp
    bytes_ = 2 * layout.tokens * channels * (cp - 1)
    rate = machine.bandwidth(ranks=cp, stride=layout.tp)
    latency = (cp - 1) * machine.constants.collective_latency
    return bytes_ / rate + latency, 2 * bytes_ / rate + latency


def _selective(machine: Machine, shape: Shape, layout: Layout, core: float) -> Cost:
    """What selective recomputation adds to a layer's backward."""
    again = core if "core_attn" in layout.recompute_modules else 0.0
    if "layernorm" in layout.recompute_modules:
        split = layout.tp if layout.sequence_parallel else 1
        again += machine.stream(layout.tokens * shape.hidden * 8 / split)
    if "mlp" not in layout.recompute_modules:
        return Cost(again)
    linears, _ = _linears(machine, shape, layout)
    mlp = shape.hidden * shape.ffn * (3 if shape.gated else 2) / shape.layer_matmul()
    collectives, _ = _tensor_parallel(machine, shape, layout)
    return Cost(again + mlp * linears, collectives / 2)


@lru_cache(maxsize=65536)
def layer(machine: Machine, shape: Shape, layout: Layout) -> Pass:
    """One decoder layer."""
    linear, linear_back = _linears(machine, shape, layout)
    core, core_back = _attention(machine, shape, layout)
    other, other_back = _elementwise(machine, shape, layout)
    tp, tp_back = _tensor_parallel(machine, shape, layout)
    cp, cp_back = _context_parallel(machine, shape, layout)
    forward = Cost(linear + core + other, tp, max(0.0, cp - core))
    backward = Cost(linear_back + core_back + other_back, tp_back, max(0.0, cp_back - core_back))
    if layout.recompute == "full":
        backward += forward
    elif layout.recompute == "selective":
        backward += _selective(machine, shape, layout, core)
    return Pass(forward, backward)


@lru_cache(maxsize=65536)
def embedding(machine: Machine, shape: Shape, layout: Layout) -> Pass:
    """Input embedding: a lookup, its sum over TP, and the scattered gradient."""
    h, tokens = shape.hidden, layout.tokens
    once = 0.0
    if layout.tp > 1:
        bytes_ = 2 * tokens * h * 2 * (layout.tp - 1) / layout.tp
        once = bytes_ / machine.bandwidth(ranks=layout.tp, stride=1)
        once += machine.constants.collective_latency
    drop = 5 if shape.dropout else 0
    return Pass(
        Cost(machine.stream(tokens * h * (4 + drop)), once),
        Cost(machine.stream(tokens * h * (8 + drop))),
    )


@lru_cache(maxsize=65536)
def loss(machine: Machine, shape: Shape, layout: Layout) -> Pass:
    """Final norm, output layer and vocabulary-parallel cross entropy."""
    tokens, rows, h = layout.tokens, shape.vocab / layout.tp, shape.hidden
    forward = matmul(machine, tokens, rows, h, format=layout.dtype)
    backward = 2 * forward + machine.stream(rows * h * 8)
    # Logits to fp32, maximum, exponential, sum; then the gradient: bytes of a logit.
    forward += machine.stream(tokens * rows * 18)
    backward += machine.stream(tokens * rows * 12)
    tp = 0.0
    if layout.tp > 1:
        bytes_ = 2 * tokens * h * 2 * (layout.tp - 1) / layout.tp
        tp = bytes_ / machine.bandwidth(ranks=layout.tp, stride=1)
        tp += 3 * machine.constants.collective_latency
    return Pass(Cost(forward, 0.0), Cost(backward, tp))

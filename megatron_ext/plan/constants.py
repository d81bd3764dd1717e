"""The constants of the time model, frozen after one fit on the calibration tables.

Written by ``python -m tools.bench.fit_plan``; errors as measured are in docs/planning.md. Each is
a physical share, time or size, not a knob of one table.
"""

from dataclasses import dataclass


@dataclass(kw_only=True, frozen=True)
class Constants:
    """What data sheets do not say."""

    ampere_matmul: float = 0.72
    """Share of the bf16 peak that a matmul of unbounded width sustains on A100 and A800."""

    hopper_matmul: float = 0.75
    """The same on H100 and H200, and for want of tables on Blackwell."""

    fp8_matmul: float = 0.62
    """The same of the FP8 peak."""

    operand_traffic: float = 1.0
    """Seconds of HBM time that matmul operands and results cost and compute does not hide."""

    wave_quantisation: float = 0.5
    """Share of the last, partly filled wave of output tiles that costs time."""

    tile_fill: float = 64.0
    """Inner length, in elements, whose time a tile loses to filling and draining its pipeline."""

    flash_attention: float = 0.75
    """Rate of a causal flash kernel, as a share of the matmul rate."""

    ring_attention: float = 0.8
    """Share of that rate left when CP cuts the kernel into a ring of smaller ones."""

    memory: float = 0.85
    """Share of the HBM bandwidth that element-wise kernels reach."""

    kernel_gap: float = 2e-6
    """Seconds that the device idles between two kernels."""

    nvlink: float = 0.75
    """Share of the NVLink bandwidth that collectives reach."""

    network: float = 0.8
    """Share of the node's network bandwidth that collectives reach."""

    collective_latency: float = 15e-6
    """Seconds of start-up of one collective."""

    tp_backward_hidden: float = 0.3
    """Share of the backward pass's TP collectives hidden under weight-gradient matmuls."""

    tp_overlap_hidden: float = 0.6
    """Share of TP collectives hidden when they run in pieces beside their matmul."""

    dp_hidden: float = 0.8
    """Share of gradient and parameter traffic hidden under compute when overlap is on."""

    p2p_exposed: float = 1.0
    """Share of stage-to-stage transfers that compute waits for, without interleaving."""

    fp8_cast_bytes: float = 3.0
    """Bytes of HBM traffic per element of a matmul input that is quantised."""

    jitter: float = 0.003
    """Share of a step lost to the slowest node, for each doubling of the nodes."""

    step_overhead: float = 0.02
    """Seconds a step spends outside its micro-batches and optimizer: data, logging, barriers."""


PRIOR = Constants()
"""What one would guess: where the fit starts, and what it is held to."""

FROZEN = Constants(
    ampere_matmul=0.8163,
    hopper_matmul=0.7426,
    fp8_matmul=0.7017,
    operand_traffic=0.6337,
    wave_quantisation=0.5323,
    tile_fill=44.69,
    flash_attention=0.7079,
    ring_attention=0.7988,
    memory=0.8437,
    kernel_gap=2.253e-06,
    nvlink=0.7597,
    network=0.6255,
    collective_latency=2.073e-05,
    tp_backward_hidden=0.2467,
    tp_overlap_hidden=0.5253,
    dp_hidden=0.8531,
    p2p_exposed=0.6906,
    fp8_cast_bytes=2.983,
    jitter=0.004255,
    step_overhead=0.02085,
)
"""Fitted on the calibration tables on 2026-11-22, and not touched since."""

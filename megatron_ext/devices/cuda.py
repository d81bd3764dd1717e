"""Which number formats each GPU's tensor cores know, and their peak. torch only where one is here.

What a plan needs besides (memory, links, FP8 peaks) is data: conf/hardware/.
"""

from typing import TYPE_CHECKING

from megatron_ext.legal import unknown_choice

if TYPE_CHECKING:
    import torch

CHIPS = {
    "v100": (7, 0),
    "a100": (8, 0),
    "a800": (8, 0),
    "rtx4090": (8, 9),
    "l40s": (8, 9),
    "h100": (9, 0),
    "h800": (9, 0),
    "h200": (9, 0),
    "b200": (10, 0),
    "gb200": (10, 0),
    "rtx_pro_6000": (12, 0),
}
"""First part of a word in conf/hardware/ (``h100`` of ``h100_80gb``) -> compute capability."""

DENSE_TFLOPS = {
    "v100": 125.0,
    "a100": 312.0,
    "a800": 312.0,
    "rtx4090": 165.2,
    "l40s": 362.0,
    "h100": 989.0,
    "h800": 989.0,
    "h200": 989.0,
    "b200": 2250.0,
    "gb200": 2450.0,
    "rtx_pro_6000": 503.8,
}
"""Published matmul peak in bf16 (V100: fp16) without sparsity, SXM boards where there are several.
MFU is measured against it, under FP8 too."""

ARCHITECTURES = {
    (7, 0): "Volta",
    (8, 0): "Ampere",
    (8, 9): "Ada",
    (9, 0): "Hopper",
    (10, 0): "Blackwell",
    (12, 0): "Blackwell RTX",
}

CPU_PRECISIONS = ("fp32", "bf16")

FLOORS = {
    "fp32": (0, 0),
    "fp16": (7, 0),
    "bf16": (8, 0),
    "fp8_delayed": (8, 9),
    "fp8_current": (8, 9),
    "fp8_block": (9, 0),
    "mxfp8": (10, 0),
}
"""Precision -> the lowest capability that runs it, as Transformer Engine 2.20 decides it."""

EXCEPT = {"mxfp8": ((12, 0),)}
"""Capabilities above the floor that still cannot: 12.0 lacks some of MXFP8's GEMM layouts."""


def capability_of(hardware: str) -> tuple[int, int] | None:
    """Compute capability of what a configuration calls ``hardware``; None for ``cpu``.

    Raises:
        ValueError: no table knows the word.
    """
    if hardware == "cpu":
        return None
    fitting = [chip for chip in CHIPS if hardware == chip or hardware.startswith(f"{chip}_")]
    if not fitting:
        raise unknown_choice("cluster.hardware", hardware, [*CHIPS, "cpu"])
    return CHIPS[max(fitting, key=len)]


def chip_of_name(device_name: str) -> str:
    """The chip behind a name as the driver prints it (``NVIDIA H100 80GB HBM3``); empty if new."""
    joined = device_name.lower().replace("-", " ").replace(" ", "")
    fitting = [chip for chip in CHIPS if chip.replace("_", "") in joined]
    return max(fitting, key=len, default="")


def architecture(capability: tuple[int, int]) -> str:
    """Generation name of the newest architecture that is not newer than ``capability``."""
    known = [c for c in ARCHITECTURES if c <= capability]
    return ARCHITECTURES[max(known)] if known else "before Volta"


def can_run(precision: str, capability: tuple[int, int] | None) -> bool:
    """Whether a device runs this precision; ``capability`` None is a CPU."""
    if capability is None:
        return precision in CPU_PRECISIONS
    known_exception = any(low <= capability for low in EXCEPT.get(precision, ()))
    return capability >= FLOORS[precision] and not known_exception


def devices_for(precision: str) -> list[str]:
    """Chips that run this precision, oldest first."""
    able = [chip for chip, capability in CHIPS.items() if can_run(precision, capability)]
    return sorted(able, key=lambda chip: CHIPS[chip])


def nearest_precision(precision: str, capability: tuple[int, int] | None) -> str:
    """The most capable precision, not beyond the one asked for, that this device does run."""
    order = list(FLOORS)
    upto = order[: order.index(precision)]
    able = [p for p in upto if can_run(p, capability)]
    return able[-1]


def refuse_precision(precision: str, capability: tuple[int, int] | None, *, where: str) -> None:
    """Refuse a precision that the device cannot run, naming the nearest device and precision.

    Raises:
        ValueError: one sentence; ``where`` says which device is meant, in words.
    """
    if can_run(precision, capability):
        return
    able = devices_for(precision)
    major, minor = CHIPS[able[0]]
    floor = f"{architecture((major, minor))} ({major}.{minor})"
    mine = (
        "a CPU"
        if capability is None
        else f"{architecture(capability)}, compute capability {capability[0]}.{capability[1]}"
    )
    raise ValueError(
        f"precision={precision} cannot run on {where} ({mine}): it needs {floor}, the nearest "
        f"device being {able[0]} (of {', '.join(able)}); here choose "
        f"precision={nearest_precision(precision, capability)}."
    )


def dense_peak_flops(dtype: str) -> float:
    """Published dense matmul FLOP/s of this process's GPU; measured for one that no table knows.

    fp32 counts as TF32, half of bf16, as in conf/hardware/.
    """
    import torch

    chip = chip_of_name(torch.cuda.get_device_name())
    if chip:
        return DENSE_TFLOPS[chip] * 1e12 * (0.5 if dtype == "fp32" else 1.0)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    return _measured_flops(torch.ones(8192, 8192, dtype=kind, device="cuda"))


def _measured_flops(square: "torch.Tensor", *, repeats: int = 10) -> float:
    """Best rate of a square product on the GPU, which published peaks exceed by a tenth or so."""
    import torch

    best = float("inf")
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(square, square)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)  # elapsed_time is in milliseconds
    return 2 * square.shape[0] ** 3 / best

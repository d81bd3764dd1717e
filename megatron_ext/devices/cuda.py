"""What each GPU can do: its peaks, and which number formats its tensor cores know. No torch."""

from dataclasses import dataclass

from megatron_ext.legal import unknown_choice


@dataclass(frozen=True)
class Gpu:
    """One kind of accelerator. TFLOP/s are dense, from NVIDIA's data sheets."""

    title: str
    capability: tuple[int, int]
    """CUDA compute capability."""

    bf16_tflops: float
    """Peak of fp16 and bf16 matmuls with fp32 accumulation."""

    fp8_tflops: float
    """0 where the tensor cores have no FP8."""

    memory_gib: int
    hbm_gb_per_second: int
    nvlink_gb_per_second: int
    """One direction, to the GPUs of its node; 0 is PCIe."""


GPUS = {
    "v100": Gpu("V100 SXM2", (7, 0), 125, 0, 32, 900, 150),
    "a100": Gpu("A100 80GB SXM", (8, 0), 312, 0, 80, 2039, 300),
    "a100_40gb": Gpu("A100 40GB SXM", (8, 0), 312, 0, 40, 1555, 300),
    "a800": Gpu("A800 80GB SXM", (8, 0), 312, 0, 80, 2039, 200),
    "rtx4090": Gpu("GeForce RTX 4090", (8, 9), 165, 330, 24, 1008, 0),
    "l40s": Gpu("L40S", (8, 9), 362, 733, 48, 864, 0),
    "h100": Gpu("H100 SXM", (9, 0), 989, 1979, 80, 3350, 450),
    "h200": Gpu("H200 SXM", (9, 0), 989, 1979, 141, 4800, 450),
    "b200": Gpu("B200", (10, 0), 2250, 4500, 180, 8000, 900),
    "gb200": Gpu("GB200", (10, 0), 2450, 4900, 186, 8000, 900),
    "rtx_pro_6000": Gpu("RTX PRO 6000 Blackwell", (12, 0), 503, 1007, 96, 1792, 0),
}

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


def gpu(word: str) -> Gpu:
    """The GPU that a configuration calls ``word``.

    Raises:
        ValueError: no table knows the word.
    """
    if word not in GPUS:
        raise unknown_choice("cluster.hardware", word, [*GPUS, "cpu"])
    return GPUS[word]


def gpu_of_name(device_name: str) -> Gpu | None:
    """The table's entry for a name as the driver prints it, such as ``NVIDIA H100 80GB HBM3``."""
    words = device_name.lower().replace("-", " ").split()
    joined = "".join(words)
    for key in sorted(GPUS, key=len, reverse=True):
        if key.replace("_", "") in joined:
            return GPUS[key]
    return None


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
    """Words of the GPUs that run this precision, oldest first."""
    able = [word for word, g in GPUS.items() if can_run(precision, g.capability)]
    return sorted(able, key=lambda word: GPUS[word].capability)


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
    low = GPUS[able[0]]
    floor = f"{architecture(low.capability)} ({low.capability[0]}.{low.capability[1]})"
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

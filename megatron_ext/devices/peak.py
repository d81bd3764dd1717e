"""The FLOP/s that MFU is measured against: published on GPUs, measured on CPUs."""

import time
from functools import cache

from megatron_ext.devices.device import current


@cache
def peak_flops(dtype: str) -> float:
    """Dense matmul FLOP/s of one rank's device at ``dtype`` (``bf16``, ``fp16``, ``fp32``)."""
    if current().name == "cuda":
        from megatron_ext.devices.cuda import dense_peak_flops

        return dense_peak_flops(dtype)
    return _measured(dtype)


def _measured(dtype: str, *, size: int = 1024, repeats: int = 4) -> float:
    """Best of a few square products with this rank's threads; about a tenth of a second."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    a = torch.ones(size, size, dtype=kind)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best

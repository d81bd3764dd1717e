"""Peak memory of this rank, on whichever device it computes."""

import resource

from megatron_ext.devices.device import current


def peak_memory_bytes() -> int:
    """Largest memory in use so far: device memory on CUDA, resident memory on CPU."""
    if current().name == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

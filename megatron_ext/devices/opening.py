"""How a run opens on a device: variables set before CUDA starts, then what it uses, in the log."""

import logging
import os
from collections.abc import MutableMapping

from megatron_ext.config import RunConfig
from megatron_ext.devices import device, paths, probe
from megatron_ext.parallel import overlap

log = logging.getLogger(__name__)


def set_environment(run: RunConfig, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what CUDA reads once, at its start. Call before anything touches a GPU.

    Asking for the GPU's generation would start CUDA, so one that needs the single hardware queue is
    assumed; on Blackwell, which does not, set CUDA_DEVICE_MAX_CONNECTIONS=32 in cluster.env.
    """
    for name, value in overlap.environment(run, capability=(9, 0)).items():
        environ.setdefault(name, value)


def announce(run: RunConfig) -> list[str]:
    """Log which code computes each part, what is broken, and refuse what was asked and is missing.

    Call after ``device.start``. Returns the lines, which rank 0's log shows.

    Raises:
        ValueError: the run asked for a library or a number format that is not to be had here.
    """
    capability = _capability()
    found = probe.guard(cuda=capability is not None)
    paths.refuse_missing(run, found, capability=capability)
    for line in paths.broken_lines(found):
        log.warning("%s", line)
    lines = [path.line() for path in paths.choose(run, found, capability=capability)]
    for line in lines:
        log.info("%s", line)
    return lines


def _capability() -> paths.Capability:
    if device.current().name != "cuda":
        return None
    import torch

    return torch.cuda.get_device_capability()

"""Where this process computes, and what has to happen there before Megatron is imported."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from megatron_ext.devices import probe

if TYPE_CHECKING:
    import torch

EXPECTED_WARNINGS = (
    ("`torch.jit.script_method` is deprecated", DeprecationWarning),
    ("`torch.jit.script` is deprecated", DeprecationWarning),
    ("Transformer Engine and Apex are not installed", UserWarning),
    ("Apex is not installed. Falling back to Torch Norm", UserWarning),
    ("The 'megatron.core.transformer.custom_layers.transformer_engine'", DeprecationWarning),
    ("Warning: tp_group is None, using default tp group", DeprecationWarning),
    ("If you are using transformer_engine as the transformer implementation", UserWarning),
    ("The following imports from `dynamic_context.py` will be removed", DeprecationWarning),
)
"""What megatron-core 0.16.1 says of itself while it is imported, configured and run."""


@dataclass(frozen=True)
class Device:
    """One kind of place to train on."""

    name: str
    """``cuda`` or ``cpu``, as torch spells it."""

    backend: str
    """Collectives of torch.distributed: ``nccl`` or ``gloo``."""

    def torch_device(self, local_rank: int = 0) -> "torch.device":
        """The device of one rank of a node."""
        import torch

        return torch.device("cuda", local_rank) if self.name == "cuda" else torch.device("cpu")

    def synchronize(self) -> None:
        """Wait until queued work is done, so that a clock read next means something."""
        if self.name == "cuda":
            import torch

            torch.cuda.synchronize()


@cache
def current() -> Device:
    """The device of this process: CUDA where there is one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return Device(name="cuda", backend="nccl")
    return Device(name="cpu", backend="gloo")


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Silence the EXPECTED_WARNINGS and nothing else."""
    with warnings.catch_warnings():
        for message, category in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=re.escape(message), category=category)
        yield


@cache
def start() -> Device:
    """Make Megatron importable and usable here; call it before the first import of megatron."""
    device = current()
    probe.guard(cuda=device.name == "cuda")
    with expected_warnings():
        if device.name == "cpu":
            from megatron_ext.devices import cpu

            cpu.enter()
        else:
            import megatron.core.models.gpt.gpt_layer_specs
            import megatron.core.optimizer  # noqa: F401
    return device

"""Transformer Engine's real Python code over a stand-in for its compiled extension.

It builds the real layers on a CPU: parameter names, shapes, sharding metadata, checkpoint layout
and recipe gating are Transformer Engine's own. Every kernel raises. Enum values are invented,
except DType's, which are those of the header; the member lists are what Transformer Engine 2.20
asserts. Nothing here says anything about numerics or speed.
"""

import enum
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

DTYPES = {
    "kByte": 0,
    "kInt32": 2,
    "kFloat32": 4,
    "kFloat16": 5,
    "kBFloat16": 6,
    "kFloat8E4M3": 7,
    "kFloat8E5M2": 8,
    "kFloat4E2M1": 10,
}
ENUMS = {
    "FP8FwdTensors": [f"GEMM{i}_{n}" for i in (1, 2, 3) for n in ("INPUT", "WEIGHT", "OUTPUT")],
    "FP8BwdTensors": [f"{n}{i}" for i in (1, 2, 3) for n in ("GRAD_OUTPUT", "GRAD_INPUT")],
    "NVTE_Fused_Attn_Backend": ["NVTE_F16_arbitrary_seqlen", "NVTE_FP8", "NVTE_No_Backend"],
}


class OpenEnum(type):
    """An enum whose members appear on first use."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = len([key for key in vars(cls) if not key.startswith("__")])
        setattr(cls, name, value)
        return value


def _extension() -> types.ModuleType:
    module = types.ModuleType("transformer_engine_torch")
    module.DType = enum.IntEnum("DType", DTYPES)  # type: ignore[attr-defined]
    for name, members in ENUMS.items():
        setattr(module, name, enum.IntEnum(name, {m: i for i, m in enumerate(members)}))
    module.get_cudnn_version = lambda: 92400  # type: ignore[attr-defined]
    module.get_cublasLt_version = lambda: 130100  # type: ignore[attr-defined]
    module.get_num_cublas_streams = lambda: 4  # type: ignore[attr-defined]

    def missing(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            made: object = OpenEnum(name, (), {})
        else:

            def made(*args: object, **kwargs: object) -> None:
                raise NotImplementedError(f"Transformer Engine kernel {name} needs a GPU build")

        setattr(module, name, made)
        return made

    module.__getattr__ = missing  # type: ignore[method-assign]
    return module


def install() -> types.ModuleType:
    """Make ``import transformer_engine.pytorch`` work. Call before the first import of megatron."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Transformer Engine: open no CUDA library
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None and spec.submodule_search_locations
    shell = types.ModuleType("transformer_engine")
    shell.__path__ = list(spec.submodule_search_locations)
    sys.modules["transformer_engine"] = shell  # imports .common without the package's __init__
    common = importlib.import_module("transformer_engine.common")
    extension = _extension()

    def load(framework: str) -> None:
        if framework != "torch":
            raise ImportError(framework)
        sys.modules["transformer_engine_torch"] = extension

    common.load_framework_extension = load
    del sys.modules["transformer_engine"]
    engine = importlib.import_module("transformer_engine")
    engine.common = common  # type: ignore[attr-defined]
    importlib.import_module("transformer_engine.pytorch")
    return engine


@contextmanager
def pretending(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """torch.cuda answers as a GPU of this capability would, while modules are built.

    Left before anything is saved or run: other code would take CUDA paths.
    """
    major, minor = capability
    properties = types.SimpleNamespace(
        major=major, minor=minor, multi_processor_count=132, name="pretended", total_memory=80 << 30
    )
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "device_count", lambda: 1),
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *a: capability),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *a: properties),
        mock.patch.object(torch.version, "cuda", "13.0"),
    ):
        yield

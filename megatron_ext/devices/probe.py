"""Optional GPU libraries, each probed once, before a broken one can take Megatron's import down.

Megatron catches ``ImportError`` around its optional imports. A half-installed Transformer Engine
raises ``RuntimeError`` or ``FileNotFoundError`` instead, a module of another project called
``apex`` switches Megatron's local layers to code that is not there, and flash-attn without its
extension stops Transformer Engine. ``guard`` finds out first and hides what cannot be used.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

USABLE, ABSENT, BROKEN, IDLE = "usable", "absent", "broken", "idle"


@dataclass(frozen=True)
class Probe:
    """What was found of one library."""

    name: str
    state: str
    """``usable``; ``absent``; ``broken``: installed, cannot work; ``idle``: not on this device."""

    version: str = ""
    reason: str = ""
    """Why it is not usable, in words a person can act on."""

    @property
    def usable(self) -> bool:
        """True when code may import it."""
        return self.state == USABLE

    def line(self) -> str:
        """One line for a log or a terminal."""
        shown = f"{self.name} {self.version}".strip()
        return f"{shown}: {self.state}" + (f" ({self.reason})" if self.reason else "")


def version_of(*distributions: str) -> str:
    """Version of the first of these distributions that is installed; empty when none is."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def place_of(module: str) -> Path | None:
    """Folder or file that ``import module`` would take, found without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin else None


def _import_error(*modules: str) -> str:
    """Why these modules do not import, empty when they do."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken build raises RuntimeError, OSError, AssertionError
            cause = " ".join(str(error).split()) or type(error).__name__
            return f"import {module}: {cause[:300]}"
    return ""


def _is_pure(distribution: str) -> bool:
    """True for a wheel of Python files only, as Transformer Engine's metapackage is."""
    try:
        wheel = importlib.metadata.distribution(distribution).read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        return False
    return "Root-Is-Purelib: true" in wheel


def _transformer_engine_fault() -> str:
    place = place_of("transformer_engine")
    if place is None or not _is_pure("transformer-engine"):
        return ""  # a source build, as in NVIDIA's containers: only importing it can tell
    if not version_of("transformer-engine-cu13", "transformer-engine-cu12"):
        return (
            "only the metapackage is installed, without the core library: pip uninstall "
            "transformer-engine, or install it whole"
        )
    around = (place.parent, place, place / "wheel_lib")
    if not any(list(folder.glob("transformer_engine_torch*.so")) for folder in around):
        return "the core library is installed without its PyTorch extension"
    return ""


def _apex_fault() -> str:
    place = place_of("apex")
    if place is None or (place / "optimizers").is_dir():
        return ""
    return f"the module at {place} is another project, not NVIDIA's apex: pip uninstall apex"


def _flash_attn_2_fault() -> str:
    if place_of("flash_attn_2_cuda") is not None or not version_of("flash-attn"):
        return ""
    return (
        "installed without its extension flash_attn_2_cuda, which also stops Transformer Engine: "
        "pip uninstall flash-attn"
    )


@dataclass(frozen=True)
class Library:
    """One optional library: where it is, what proves it whole, what adds it."""

    name: str
    distribution: str
    module: str
    """Top-level module whose presence counts as installed."""

    imports: tuple[str, ...]
    """Modules that must import before it counts as usable."""

    install: str
    fault: Callable[[], str] = str
    """Says from its files alone why it cannot work; empty when they look whole."""

    shares_module: bool = False
    """Another distribution puts files under the same module, so this one must be installed."""

    def place(self) -> Path | None:
        """Where it is, None when it is not installed."""
        if self.shares_module and not version_of(self.distribution):
            return None
        return place_of(self.module)

    def probe(self, *, cuda: bool) -> Probe:
        """Judge it by its files, and by importing it only where it could run."""
        version = version_of(self.distribution)
        if self.place() is None:
            return Probe(self.name, ABSENT)
        if fault := self.fault():
            return Probe(self.name, BROKEN, version, fault)
        if not cuda:
            return Probe(self.name, IDLE, version, "no CUDA device; its kernels run nowhere else")
        error = _import_error(*self.imports)
        return Probe(self.name, BROKEN if error else USABLE, version, error)


LIBRARIES = (
    Library(
        "flash_attn_2",
        "flash-attn",
        "flash_attn",
        ("flash_attn_2_cuda", "flash_attn.flash_attn_interface"),
        "pip install --no-build-isolation flash-attn (hours of nvcc where no wheel fits)",
        _flash_attn_2_fault,
        shares_module=True,
    ),
    Library(
        "flash_attn_3",
        "flash-attn-3",
        "flash_attn_interface",
        ("flash_attn_interface",),
        "build hopper/ of the flash-attention sources (docs/install.md)",
    ),
    Library(
        "flash_attn_4",
        "flash-attn-4",
        "flash_attn",
        ("flash_attn.cute.interface",),
        "pip install flash-attn-4 (Hopper and Blackwell)",
        shares_module=True,
    ),
    Library(
        "transformer_engine",
        "transformer-engine",
        "transformer_engine",
        ("transformer_engine.pytorch",),
        "NVTE_BUILD_USE_NVIDIA_WHEELS=1 pip install --no-build-isolation "
        "'transformer_engine[core-cu13,pytorch]==2.20.2' (docs/install.md)",
        _transformer_engine_fault,
    ),
    Library(
        "apex",
        "apex",
        "apex",
        ("apex.optimizers", "amp_C"),
        "optional; from NVIDIA's sources only, the PyPI name is another project (docs/install.md)",
        _apex_fault,
    ),
    Library(
        "fused_weight_gradient",
        "apex",
        "fused_weight_gradient_mlp_cuda",
        ("fused_weight_gradient_mlp_cuda",),
        "part of NVIDIA's apex built with --cuda_ext (docs/install.md)",
    ),
)
"""In the order of probing: flash-attn before Transformer Engine, whose import needs it whole."""


def probe_all(*, cuda: bool) -> dict[str, Probe]:
    """Probe every optional GPU library; ``cuda`` says whether a device could run them.

    Without a device nothing is imported, which keeps a CPU start as fast as it was.
    """
    if cuda:
        importlib.import_module("torch")  # first: it preloads the CUDA libraries the rest link to
    return {library.name: library.probe(cuda=cuda) for library in LIBRARIES}


def _hide(module: str) -> None:
    """Make ``import module`` raise ImportError, which every optional import catches."""
    for loaded in [m for m in sys.modules if m == module or m.startswith(f"{module}.")]:
        del sys.modules[loaded]
    sys.modules[module] = None  # type: ignore[assignment]


@functools.cache
def guard(*, cuda: bool) -> dict[str, Probe]:
    """Probe everything once per process and hide what cannot be used. Call before Megatron.

    On a machine without a device that hides working libraries too: Megatron picks their layers
    and optimizers by the mere import, and those refuse CPU tensors.
    """
    probes = probe_all(cuda=cuda)
    for name in ("transformer_engine", "apex"):
        if not probes[name].usable and probes[name].state != ABSENT:
            _hide(name)
    flash = [probes[f"flash_attn_{n}"] for n in (2, 4)]  # both live in the package flash_attn
    if any(p.state != ABSENT for p in flash) and not any(p.usable for p in flash):
        _hide("flash_attn")
    return probes


def install_of(name: str) -> str:
    """What adds the library of this name."""
    return next(library.install for library in LIBRARIES if library.name == name)


def require(probe: Probe, *, asked_by: str) -> None:
    """Refuse a run that asked for a library which cannot be used here.

    Raises:
        ValueError: naming the setting, what is wrong and what adds the library.
    """
    if not probe.usable:
        why = probe.reason or "it is not installed"
        raise ValueError(
            f"{asked_by} needs {probe.name}, which is {probe.state} ({why}): "
            f"{install_of(probe.name)}; or change {asked_by.partition('=')[0]}."
        )

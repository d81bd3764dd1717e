"""What this machine has: driver, GPUs, torch's build. Found out without importing torch."""

import ctypes
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field

from megatron_ext.devices.probe import place_of, version_of

GPU_QUERY = "name,compute_cap,memory.total,driver_version"


@dataclass(frozen=True)
class InstalledGpu:
    """One GPU as the driver reports it."""

    name: str
    capability: tuple[int, int]
    memory_gib: float
    driver: str


@dataclass(frozen=True)
class Machine:
    """The facts that decide which code can run here."""

    python: str
    system: str
    has_driver: bool
    """``libcuda.so.1`` loads: a GPU may still be missing."""

    nvcc: str
    """Release of the CUDA compiler on the path; empty without one. Only source builds need it."""

    torch: str
    """Installed version; empty when it is not."""

    torch_cuda: str
    """CUDA release torch was built for; empty for a CPU build."""

    gpus: list[InstalledGpu] = field(default_factory=list)

    @property
    def capability(self) -> tuple[int, int] | None:
        """Of the least capable GPU that torch can use; None trains on the CPU."""
        if not (self.torch_cuda and self.gpus):
            return None
        return min(gpu.capability for gpu in self.gpus)


def inspect_machine() -> Machine:
    """Look at this machine; takes milliseconds where there is no GPU."""
    has_driver = _loads("libcuda.so.1")
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()} {_libc()}".strip(),
        has_driver=has_driver,
        nvcc=_nvcc(),
        torch=version_of("torch"),
        torch_cuda=_torch_cuda(),
        gpus=_gpus() if has_driver else [],
    )


def _libc() -> str:
    name, version = platform.libc_ver()
    return f"{name} {version}".strip()


def _loads(library: str) -> bool:
    if sys.platform != "linux":
        return False
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _torch_cuda() -> str:
    """From the file that torch itself reads, since ``import torch`` takes two seconds."""
    place = place_of("torch")
    version_file = place / "version.py" if place else None
    if version_file is None or not version_file.is_file():
        return ""
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", version_file.read_text(), re.M)
    return found[1] if found else ""


def _output(command: list[str]) -> str:
    """What a small program prints; empty when it is missing, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _nvcc() -> str:
    found = re.search(r"release ([\d.]+)", _output(["nvcc", "--version"]))
    return found[1] if found else ""


def _gpus() -> list[InstalledGpu]:
    text = _output(["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"])
    return [gpu for line in text.splitlines() if (gpu := parse_gpu(line))]


def parse_gpu(line: str) -> InstalledGpu | None:
    """One line of nvidia-smi's answer to GPU_QUERY; None when it says something else."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 4 or not re.fullmatch(r"\d+\.\d+", parts[1]):
        return None
    major, minor = map(int, parts[1].split("."))
    memory = float(parts[2]) / 1024 if re.fullmatch(r"[\d.]+", parts[2]) else 0.0
    return InstalledGpu(parts[0], (major, minor), round(memory, 1), parts[3])

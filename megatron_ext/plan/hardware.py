"""Accelerators and networks, read from data files whose every figure has a source."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from megatron_ext.legal import unknown_choice

CONF = Path(__file__).resolve().parents[2] / "conf"


@dataclass(kw_only=True, frozen=True)
class Hardware:
    """One accelerator."""

    name: str
    generation: str
    """``ampere``, ``hopper`` or ``blackwell``: which measured efficiencies apply."""

    peak: dict[str, float] = field(hash=False)
    """Dense FLOP/s by format."""

    memory_bytes: float
    memory_bandwidth: float
    """Bytes/s."""

    nvlink_bandwidth: float
    """Bytes/s in one direction."""

    nvlink_domain: int
    """Accelerators that NVLink joins."""

    network: str
    """What usually joins nodes of these: a name in conf/network/."""

    multiprocessors: int
    """Streaming multiprocessors: how many output tiles of a matmul run at once."""

    fp8_recipes: tuple[str, ...] = ()
    """FP8 recipes that Transformer Engine runs here."""


@dataclass(kw_only=True, frozen=True)
class Network:
    """What joins the nodes."""

    name: str
    node_bandwidth: float
    """Bytes/s in one direction, all of a node's adapters together."""


def _figures(kind: str, name: str) -> dict:
    folder = CONF / kind
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        raise unknown_choice(f"cluster.{kind}", name, known)
    stored = yaml.safe_load(path.read_text())
    return {
        key: entry["value"] if isinstance(entry, dict) and "value" in entry else entry
        for key, entry in stored.items()
    }


@cache
def hardware(name: str) -> Hardware:
    """The accelerator that ``conf/hardware/<name>.yaml`` describes.

    Raises:
        ValueError: no such file; the known names are listed.
    """
    figures = _figures("hardware", name)
    peaks = {key: figures[f"{key}_tflops"] * 1e12 for key in ("bf16", "fp32")}
    peaks["fp16"] = peaks["bf16"]
    if figures.get("fp8_tflops"):
        peaks["fp8"] = figures["fp8_tflops"] * 1e12
    return Hardware(
        name=name,
        generation=figures["generation"],
        peak=peaks,
        memory_bytes=figures["memory_gib"] * 2**30,
        memory_bandwidth=figures["memory_gbs"] * 1e9,
        nvlink_bandwidth=figures["nvlink_gbs_per_direction"] * 1e9,
        nvlink_domain=figures["nvlink_domain"],
        network=figures["network"],
        multiprocessors=figures["multiprocessors"],
        fp8_recipes=tuple(figures.get("fp8_recipes") or ()),
    )


@cache
def network(name: str) -> Network:
    """The network that ``conf/network/<name>.yaml`` describes.

    Raises:
        ValueError: no such file; the known names are listed.
    """
    figures = _figures("network", name)
    return Network(name=name, node_bandwidth=figures["node_gbs"] * 1e9)

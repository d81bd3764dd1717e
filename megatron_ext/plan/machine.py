"""What a rank runs on, at the rates that software reaches, and seconds by their kind."""

from dataclasses import dataclass

from megatron_ext.plan.constants import Constants
from megatron_ext.plan.hardware import Hardware, Network


@dataclass(kw_only=True, frozen=True)
class Machine:
    """What a rank runs on: device, links, and how well software uses them."""

    hardware: Hardware
    network: Network
    gpus_per_node: int
    constants: Constants

    def matmul_rate(self, format: str) -> float:
        """FLOP/s that an unboundedly wide matmul sustains."""
        if format == "fp8":
            return self.hardware.peak["fp8"] * self.constants.fp8_matmul
        share = self.constants.ampere_matmul
        if self.hardware.generation != "ampere":
            share = self.constants.hopper_matmul
        return self.hardware.peak[format] * share

    def stream(self, bytes_: float) -> float:
        """Seconds that an element-wise kernel over ``bytes_`` takes."""
        return bytes_ / (self.hardware.memory_bandwidth * self.constants.memory)

    def bandwidth(self, *, ranks: int, stride: int) -> float:
        """Bytes/s of one rank's collectives in a group of ``ranks`` that are ``stride`` apart."""
        inside = self.hardware.nvlink_bandwidth * self.constants.nvlink
        if ranks * stride <= max(self.hardware.nvlink_domain, 1):
            return inside
        rings = min(stride, self.gpus_per_node)
        return min(inside, self.network.node_bandwidth * self.constants.network / rings)


@dataclass(frozen=True)
class Cost:
    """Seconds on the compute stream and exposed seconds of TP and CP collectives."""

    compute: float
    tp: float = 0.0
    cp: float = 0.0

    @property
    def total(self) -> float:
        """Everything."""
        return self.compute + self.tp + self.cp

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.compute + other.compute, self.tp + other.tp, self.cp + other.cp)

    def scaled(self, by: float) -> "Cost":
        """``by`` times as much of everything."""
        return Cost(self.compute * by, self.tp * by, self.cp * by)


@dataclass(frozen=True)
class Pass:
    """Forward and backward of one piece, recomputation in the backward."""

    forward: Cost
    backward: Cost

    @property
    def total(self) -> Cost:
        """Both."""
        return self.forward + self.backward

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(self.forward + other.forward, self.backward + other.backward)

    def scaled(self, by: float) -> "Pass":
        """``by`` times as much of both."""
        return Pass(self.forward.scaled(by), self.backward.scaled(by))

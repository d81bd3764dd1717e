"""What a conversion did, tensor by tensor: as text for a person and as JSON for a program."""

import json
import resource
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_ext.convert.moves import Move


@dataclass
class Entry:
    """One Megatron tensor and the Hugging Face tensors that it is."""

    megatron: str
    huggingface: list[str]
    rule: str
    shape: list[int]
    dtype: str
    bytes: int
    padding_rows: int = 0
    """Rows added on import, or cut on export."""


@dataclass
class Report:
    """A finished conversion."""

    direction: str
    source: str
    target: str
    family: str = ""
    layers: int = 0
    entries: list[Entry] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Stored things that were not converted, each with its reason."""

    vocab_size: int = 0
    padded_vocab: int = 0
    rotary_base: float = 0.0
    rotary_percent: float = 1.0
    tied: bool = False
    head: str = "plain"
    """``plain``, ``norm-head, raw rows`` or ``norm-head, folded``."""

    tokenizer_sha256: str = ""
    warnings: list[str] = field(default_factory=list)
    huggingface_tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    largest_tensor_bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    verification: dict[str, Any] | None = None
    started: float = field(default_factory=time.monotonic, repr=False)

    def add(self, move: Move, *, dtype: str, size: int, padding_rows: int = 0) -> None:
        """Account for one tensor."""
        self.entries.append(
            Entry(
                megatron=move.name,
                huggingface=move.sources(),
                rule=type(move.rule).__name__,
                shape=list(move.shape),
                dtype=dtype,
                bytes=size,
                padding_rows=padding_rows,
            )
        )

    def close(self, order: list[Move]) -> None:
        """Put the entries in the table's order, and add up."""
        place = {move.name: number for number, move in enumerate(order)}
        self.entries.sort(key=lambda entry: place[entry.megatron])
        self.huggingface_tensors = sum(len(entry.huggingface) for entry in self.entries)
        self.parameters = sum(_numbers(entry.shape) for entry in self.entries)
        self.bytes = sum(entry.bytes for entry in self.entries)
        self.largest_tensor_bytes = max(entry.bytes for entry in self.entries)
        self.seconds = time.monotonic() - self.started
        # Linux counts ru_maxrss in KiB.
        self.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    def as_json(self) -> str:
        """All of it."""
        content = asdict(self)
        content.pop("started")
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def as_text(self, *, tensors: bool = True) -> str:
        """All of it, or without the list of tensors."""
        lines = [f"{self.direction}: {self.source} -> {self.target}"]
        lines.append(
            f"  {self.family}, {self.layers} layers, {self.parameters:,} parameters in "
            f"{self.huggingface_tensors} Hugging Face tensors and {len(self.entries)} Megatron ones"
        )
        lines.append(
            f"  vocabulary {self.vocab_size} (padded: {self.padded_vocab}), RoPE base "
            f"{self.rotary_base:g} on {self.rotary_percent:.0%} of each head, "
            f"{'tied' if self.tied else 'untied'}, head {self.head}, "
            f"tokenizer {self.tokenizer_sha256[:16] or 'none'}"
        )
        if tensors:
            lines += [_line(entry) for entry in self.entries]
        lines += [f"  left out: {name} ({why})" for name, why in self.left_out.items()]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        lines.append(
            f"  {self.bytes / 2**30:.3f} GiB in {self.seconds:.1f} s, peak memory "
            f"{self.peak_memory_bytes / 2**20:.0f} MiB, largest tensor "
            f"{self.largest_tensor_bytes / 2**20:.0f} MiB"
        )
        return "\n".join(lines)


def _numbers(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _line(entry: Entry) -> str:
    padding = f", {entry.padding_rows} padding rows" if entry.padding_rows else ""
    names = " + ".join(entry.huggingface)
    return (
        f"  {entry.rule:8} {entry.megatron} {entry.shape} {entry.dtype} "
        f"{entry.bytes} bytes{padding} = {names}"
    )

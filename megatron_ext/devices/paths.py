"""Which code computes each part of a run on one machine, why, and what the slower ways cost.

One decision for everybody: the model builder follows it, the first log lines and tools.doctor
print it. No torch here; what a machine has comes in as probes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.config import RunConfig
from megatron_ext.devices.cuda import architecture, refuse_precision
from megatron_ext.devices.probe import BROKEN, Probe, require

Capability = tuple[int, int] | None
"""CUDA compute capability; None is a CPU."""


@dataclass(frozen=True)
class Path:
    """One part of a training step and the code that computes it."""

    part: str
    taken: str
    cost: str = ""
    """What this way lacks against the best one; empty when it is the best one."""

    def line(self) -> str:
        """One line for a log or a terminal."""
        return f"{self.part}: {self.taken}" + (f"; {self.cost}" if self.cost else "")


def uses_transformer_engine(run: RunConfig, found: Mapping[str, Probe]) -> bool:
    """Whether the blocks are Transformer Engine's layers rather than the local ones."""
    return run.kernels.transformer_impl != "local" and found["transformer_engine"].usable


def fuses_weight_gradients(run: RunConfig, found: Mapping[str, Probe]) -> bool:
    """Whether matmuls add their weight gradient straight into the gradient buffer.

    Megatron's output layer needs apex's extension for it even under Transformer Engine, and raises
    without.
    """
    asked = run.kernels.gradient_accumulation_fusion
    return found["fused_weight_gradient"].usable and asked is not False


def refuse_missing(run: RunConfig, found: Mapping[str, Probe], *, capability: Capability) -> None:
    """Refuse a run that asked for something this machine does not have.

    Raises:
        ValueError: the setting, what is missing or broken, and what adds it.
    """
    where = "this machine"
    refuse_precision(run.precision.word(), capability, where=where)
    kernels, engine = run.kernels, found["transformer_engine"]
    if kernels.transformer_impl == "transformer_engine":
        require(engine, asked_by="kernels.transformer_impl=transformer_engine")
    if run.precision.fp8 is not None:
        require(engine, asked_by=f"precision={run.precision.word()}")
    if run.parallel.context_parallel_size > 1:
        size = run.parallel.context_parallel_size
        require(engine, asked_by=f"parallel.context_parallel_size={size}")
    if run.parallel.tp_comm_overlap:
        require(engine, asked_by="parallel.tp_comm_overlap=true")
    if kernels.attention_backend != "auto":
        require(engine, asked_by=f"kernels.attention_backend={kernels.attention_backend}")
    if kernels.attention_backend == "flash" and not _flash(found):
        require(found["flash_attn_2"], asked_by="kernels.attention_backend=flash")
    if kernels.gradient_accumulation_fusion:
        require(
            found["fused_weight_gradient"], asked_by="kernels.gradient_accumulation_fusion=true"
        )


def choose(run: RunConfig, found: Mapping[str, Probe], *, capability: Capability) -> list[Path]:
    """The way of each part of a step, for a run that ``refuse_missing`` lets through."""
    engine = uses_transformer_engine(run, found)
    return [
        _device(run, capability),
        _layers(found, engine=engine, capability=capability),
        _attention(run, found, engine=engine, capability=capability),
        _optimizer(found, capability=capability),
        _weight_gradients(run, found, capability=capability),
        Path("loss", "our vocabulary-parallel cross entropy, block by block"),
    ]


def broken_lines(found: Mapping[str, Probe]) -> list[str]:
    """One line for each library that is installed and cannot work."""
    return [f"{p.line()}; the run goes on without it" for p in found.values() if p.state == BROKEN]


def _flash(found: Mapping[str, Probe]) -> str:
    """The flash-attn that Transformer Engine would take: the newest usable one."""
    for name in ("flash_attn_4", "flash_attn_3", "flash_attn_2"):
        if found[name].usable:
            return f"{name} {found[name].version}".strip()
    return ""


def _device(run: RunConfig, capability: Capability) -> Path:
    precision = run.precision
    formats = precision.word()
    if precision.fp8 is not None:
        formats += " in the blocks' linear layers, bf16 around them, fp32 loss and masters"
    if precision.first_last_layers_bf16:
        first, last = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
        formats += f"; the first {first} and last {last} blocks in bf16"
    if capability is None:
        return Path("device", f"CPU over gloo, {formats}", "correct, and far slower than a GPU")
    major, minor = capability
    return Path("device", f"{architecture(capability)} ({major}.{minor}) over NCCL, {formats}")


def _layers(found: Mapping[str, Probe], *, engine: bool, capability: Capability) -> Path:
    if engine:
        return Path("layers", f"Transformer Engine {found['transformer_engine'].version}")
    lost = "no fused norm and linear, no FP8, no context parallelism, no TP overlap"
    return Path("layers", "local (torch)", "" if capability is None else lost)


def _attention(
    run: RunConfig, found: Mapping[str, Probe], *, engine: bool, capability: Capability
) -> Path:
    if not engine:
        isolation = "documents by their own calls"
        return Path("attention", f"torch SDPA, causal without a mask; {isolation}")
    asked, flash = run.kernels.attention_backend, _flash(found)
    if asked == "flash":
        return Path("attention", f"flash-attn ({flash}), asked for")
    if asked == "fused":
        return Path("attention", "cuDNN fused attention, asked for")
    if asked == "unfused":
        lost = "writes every score: memory grows with the square of the sequence"
        return Path("attention", "Transformer Engine unfused, asked for", lost)
    if flash:
        return Path("attention", f"cuDNN fused or {flash}, as Transformer Engine ranks them")
    return Path("attention", "cuDNN fused (no flash-attn installed)")


def _optimizer(found: Mapping[str, Probe], *, capability: Capability) -> Path:
    if found["transformer_engine"].usable:
        return Path(
            "optimizer, clipping", "Transformer Engine's FusedAdam and multi-tensor kernels"
        )
    if found["apex"].usable:
        return Path("optimizer, clipping", "apex's FusedAdam and multi-tensor kernels")
    lost = "" if capability is None else "several kernels a step instead of one"
    return Path("optimizer, clipping", "torch AdamW and foreach", lost)


def _weight_gradients(
    run: RunConfig, found: Mapping[str, Probe], *, capability: Capability
) -> Path:
    if fuses_weight_gradients(run, found):
        return Path("weight gradients", "added inside the matmul (apex's extension)")
    lost = "" if capability is None else "one more pass over each weight gradient"
    return Path("weight gradients", "added after the matmul", lost)

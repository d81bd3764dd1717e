"""Tokens per second, model FLOPs utilisation, memory, and the time left."""

import time
from typing import TYPE_CHECKING

from megatron_ext.config import RunConfig
from megatron_ext.devices.memory import peak_memory_bytes
from megatron_ext.devices.peak import peak_flops
from megatron_ext.plan.flops import flops_per_token
from megatron_ext.train.callback import Callback, Metrics

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer

SMOOTHING = 0.9  # weight of the past in the rate that the ETA uses


class Throughput(Callback):
    """Adds ``tokens_per_second``, ``mfu``, ``memory_gib`` and ``eta_seconds`` to the metrics.

    MFU is FLOPs per token x tokens/s over the peak of all ranks, with forward and backward
    counted and recomputation not (PaLM, arXiv:2204.02311, appendix B). Whether the attention
    square counts in full or by its causal half is ``logging.mfu_convention``.
    """

    def __init__(self, run: RunConfig):
        self.run = run
        self.seconds_per_step = 0.0
        self.last = 0.0
        self.peak = 0.0
        self.flops: dict[int, float] = {}

    def before_training(self, trainer: "Trainer") -> None:
        """Ask the device for its peak and start the clock."""
        self.peak = peak_flops(self.run.precision.dtype)
        self.last = time.perf_counter()

    def after_step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """The rate over the whole time since the last step, saving and evaluation included."""
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        seconds = metrics["seconds"]
        past = self.seconds_per_step or elapsed
        self.seconds_per_step = SMOOTHING * past + (1 - SMOOTHING) * elapsed
        tokens = metrics["global_batch_size"] * metrics["seq_length"]
        flops = self._flops_per_token(metrics["seq_length"])
        metrics["tokens_per_second"] = tokens / seconds
        metrics["mfu"] = flops * tokens / seconds / (self.peak * trainer.env.world_size)
        metrics["memory_gib"] = peak_memory_bytes() / 2**30
        metrics["eta_seconds"] = trainer.plan.steps_left(trainer.state) * self.seconds_per_step

    def _flops_per_token(self, seq_length: int) -> float:
        if seq_length not in self.flops:
            convention = self.run.logging.mfu_convention
            self.flops[seq_length] = flops_per_token(
                self.run.model, seq_length, convention=convention
            )
        return self.flops[seq_length]

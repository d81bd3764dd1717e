"""Steps whose loss or gradients are not sound: run again, then passed over, each decision kept."""

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext import jsonl
from megatron_ext.resilience.config import ENOUGH, WatchConfig
from megatron_ext.resilience.suspicions import UNSOUND_EXIT
from megatron_ext.train.state import TrainState

log = logging.getLogger(__name__)


class UnsoundError(FloatingPointError):
    """Steps are bad beyond what the run may pass over."""

    exit_code = UNSOUND_EXIT


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """Samples [first, past) of a phase that the run does not train on."""

    phase: int
    first: int
    past: int
    step: int
    reason: str
    numbering: str = ""
    """What the samples are counted over (``TrainState.numbering``)."""

    @property
    def place(self) -> tuple[int, str, int]:
        """Where it begins, as ``TrainState.place``."""
        return self.phase, self.numbering, self.first


class Numerics:
    """Judges a step between its backward pass and its update. Every rank takes part.

    A fault that is gone when the same step is run again was the hardware's. One that stays is
    the data's or the model's: the update is not taken, and training passes over the samples.
    """

    def __init__(
        self, watch: WatchConfig, run_dir: Path, *, rank: int, gradients: bool = True
    ) -> None:
        self._watch, self._rank, self._gradients = watch, rank, gradients
        self._file = run_dir / "decisions.jsonl"
        self._state = TrainState()
        self._tried = (-1, "", -1)
        self._past = jsonl.read(self._file, PassedOver)
        self.fault = ""

    def against(self, state: TrainState) -> "Numerics":
        """The judge of a step that is compared with those that ``state`` remembers."""
        self._state = state
        return self

    def sound_gradients(self, loss: float, chunks: list[Any]) -> bool:
        """Whether loss and gradients are finite, and the loss is none that stands out."""
        if not math.isfinite(loss):
            self.fault = f"loss is {loss}"
        elif self._gradients and not _finite_everywhere(chunks):
            self.fault = "a gradient is not finite"
        else:
            self.fault = _spike("loss", loss, self._state.recent_losses, self._watch.spike_factor)
        return not self.fault

    def sound_norm(self, grad_norm: float) -> bool:
        """Whether the norm, equal on all ranks, is none that stands out."""
        factor = self._watch.grad_spike_factor
        self.fault = _spike("gradient norm", grad_norm, self._state.recent_norms, factor)
        return not self.fault

    def taken(self, state: TrainState, loss: float, grad_norm: float) -> None:
        """A step was taken: later ones are compared with it."""
        state.recent_losses.append(loss)
        if grad_norm > 0:  # 0 where fp16 passed the update over
            state.recent_norms.append(grad_norm)
        for window in (state.recent_losses, state.recent_norms):
            del window[: -self._watch.spike_window_steps]

    def tried(self, state: TrainState) -> bool:
        """Whether the step at this place was bad just now."""
        return self._tried == state.place

    def first_time(self, state: TrainState) -> bool:
        """Whether the fault is new at this place: then the step is only run again."""
        new = not self.tried(state)
        self._tried = state.place
        if new:
            log.warning("step %d: %s; running the step again", state.step + 1, self.fault)
        return new

    def intervene(self, state: TrainState) -> str:
        """``skip`` or ``rewind``.

        Raises:
            UnsoundError: interventions are spent, or the run wants none.
        """
        done = len(self._past)
        if self._watch.on_bad_step == "stop" or done >= self._watch.max_interventions:
            raise UnsoundError(
                f"{self.fault} at step {state.step + 1} again, after {done} interventions"
            )
        return self._watch.on_bad_step

    def skip(self, state: TrainState, past: int) -> None:
        """Pass over the phase's samples up to ``past``, and write that down."""
        decision = PassedOver(
            phase=state.phase,
            first=state.phase_samples,
            past=past,
            step=state.step,
            reason=self.fault,
            numbering=state.numbering,
        )
        self._past.append(decision)
        if self._rank == 0:
            jsonl.append(self._file, decision)
        self._apply(state, decision)

    def replay(self, state: TrainState) -> None:
        """Take the decision of an earlier attempt at this place, so that the curve is the same."""
        here = [d for d in self._past if d.place == state.place]
        if here:
            self._apply(state, max(here, key=lambda d: d.past))

    def _apply(self, state: TrainState, decision: PassedOver) -> None:
        log.warning(
            "step %d: passing over samples %d to %d of phase %d: %s",
            state.step + 1,
            decision.first,
            decision.past,
            decision.phase,
            decision.reason,
        )
        state.skipped.append(asdict(decision))
        state.phase_samples = max(state.phase_samples, decision.past)


def _spike(what: str, value: float, past: Sequence[float], factor: float) -> str:
    """What to say of a value above ``factor`` times the median of its past; else empty.

    Some models' norms have peaks of their own. On a logarithmic scale, a value has to be twice as
    far above the median as the largest of the window is, and a factor of 2 more.
    """
    if not factor or len(past) < ENOUGH:
        return ""
    median = statistics.median(past)
    factor = max(factor, 2 * (max(past) / median) ** 2) if median > 0 else factor
    if value <= factor * median:
        return ""
    return f"{what} {value:.3f} is above {factor:.3g} x the median {median:.3f}"


def _finite_everywhere(chunks: list[Any]) -> bool:
    """Whether all gradients are finite on all ranks; every rank must call this."""
    buffers = [b for chunk in chunks for b in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    # A sum is finite only if every part is; an overflow of the sum itself is a fault too.
    sums = [b.grad_data.sum(dtype=torch.float32) for b in buffers]
    total = torch.stack(sums).sum() if sums else torch.zeros(())
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return math.isfinite(float(total))

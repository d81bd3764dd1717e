"""A run over time: its phases with everything resolved, and the step at which each one ends.

Imports no torch: submission, planning and pictures read the same plan as the trainer.
"""

from dataclasses import dataclass

from megatron_ext.config import RunConfig
from megatron_ext.train.config import PhaseConfig, check_lengths
from megatron_ext.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase with the run's defaults filled in."""

    index: int
    name: str
    config: PhaseConfig
    seq_length: int
    """Tokens per sequence."""

    rotary_base: float
    first_batch: int
    """Sequences per step when the phase begins."""

    start_tokens: int
    """Tokens of all phases before this one, each rounded up to whole steps."""

    def global_batch_size(self, phase_tokens: int) -> int:
        """Sequences of the step that begins after ``phase_tokens`` of the phase.

        Growth on plateaus is not in here: it depends on the loss (megatron_ext/optim/growth.py).
        """
        size = self.first_batch
        for step in self.config.batch_steps:
            if phase_tokens >= step.after_tokens:
                size = step.global_batch_size
        return size

    def batches(self) -> list[tuple[int, int, int]]:
        """Runs of equal steps as (steps, sequences per step, tokens before the first of them)."""
        cuts = [s.after_tokens for s in self.config.batch_steps if s.after_tokens > 0]
        runs, tokens = [], 0
        while tokens < self.config.tokens:
            size = self.global_batch_size(tokens)
            end = min([c for c in cuts if c > tokens] + [self.config.tokens])
            steps = -(-(end - tokens) // (size * self.seq_length))
            runs.append((steps, size, tokens))
            tokens += steps * size * self.seq_length
        return runs

    @property
    def steps(self) -> int:
        """Optimizer steps, without growth on plateaus."""
        return sum(steps for steps, _, _ in self.batches())

    @property
    def tokens(self) -> int:
        """Tokens in whole steps: at least ``config.tokens``."""
        return sum(steps * size * self.seq_length for steps, size, _ in self.batches())


@dataclass(frozen=True)
class Plan:
    """Every phase of a run, in order."""

    phases: tuple[Phase, ...]

    @classmethod
    def of(cls, run: RunConfig) -> "Plan":
        """Resolve ``run.phases``.

        Raises:
            ValueError: no phase; a length or a batch below 1, by its dotted key.
        """
        check_lengths(run.phases)
        phases: list[Phase] = []
        start, base = 0, run.model.rotary_base
        for index, config in enumerate(run.phases):
            _check_sizes(index, config, run)
            base = config.rotary_base if config.rotary_base is not None else base
            phase = Phase(
                index=index,
                name=config.name or f"phase{index}",
                config=config,
                seq_length=config.seq_length or run.batch.seq_length,
                rotary_base=base,
                first_batch=config.global_batch_size or run.batch.global_batch_size,
                start_tokens=start,
            )
            phases.append(phase)
            start += phase.tokens
        return cls(tuple(phases))

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, without growth on plateaus."""
        return sum(p.steps for p in self.phases)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return sum(p.tokens for p in self.phases)

    def finished(self, state: TrainState) -> bool:
        """Whether every phase is over."""
        return state.phase >= len(self.phases)

    def steps_left(self, state: TrainState) -> int:
        """Optimizer steps still to take, counting at the batch size of now."""
        if self.finished(state):
            return 0
        here = self.phases[state.phase]
        size = here.global_batch_size(state.phase_tokens)
        size = int(state.growth.get("global_batch_size", size))
        rest = max(here.config.tokens - state.phase_tokens, 0)
        later = sum(p.steps for p in self.phases[state.phase + 1 :])
        return -(-rest // (size * here.seq_length)) + later


def _check_sizes(index: int, config: PhaseConfig, run: RunConfig) -> None:
    """Refuse lengths and batches below 1, which no arithmetic survives."""
    key = f"phases.{index}"
    sizes: dict[str, int | None] = {
        f"{key}.seq_length": config.seq_length,
        f"{key}.global_batch_size": config.global_batch_size,
        "batch.seq_length": run.batch.seq_length,
        "batch.global_batch_size": run.batch.global_batch_size,
    }
    for number, step in enumerate(config.batch_steps):
        sizes[f"{key}.batch_steps.{number}.global_batch_size"] = step.global_batch_size
    for name, size in sizes.items():
        if size is not None and size < 1:
            inherits = name in (f"{key}.seq_length", f"{key}.global_batch_size")
            way_out = ", or null for the run's own" if inherits else ""
            raise ValueError(f"{name}={size} must be at least 1{way_out}.")

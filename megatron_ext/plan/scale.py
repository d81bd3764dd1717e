"""Shrinks a whole run, shape and phases together, so that its recipe can be tried on a laptop.

What is kept: depth over width between the systems, query heads per KV head, head form, rotary
share, norms and biases, the order and relative length of phases, where warmups, decays, batch
steps and ramps lie inside them, and how batches and sequence lengths relate to each other.
"""

import math
from dataclasses import dataclass, field, replace
from typing import TypeVar

from megatron_ext.config import RunConfig
from megatron_ext.data.config import SourceConfig
from megatron_ext.optim.config import OptimizerConfig, ScheduleConfig
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.plan.scale_model import shrink_model
from megatron_ext.train.config import BatchStep, PhaseConfig, check_lengths

Run = TypeVar("Run", bound=RunConfig)

MIN_SEQ_LENGTH = 64


@dataclass(kw_only=True)
class ScaleConfig:
    """How small. Choices: conf/scale/; ``full`` leaves the recipe as published."""

    parameters: int = 0
    """Non-embedding parameters to aim at; 0 leaves the whole run unshrunk."""

    depth_factor: float = 1.0
    """Layers per unit of width, over the published ratio: very small models need more depth."""

    vocab_size: int = 8192
    """True vocabulary of the shrunk model: at least that of the tokenizer in use."""

    tokens: int = 1_000_000
    """Length of all phases together."""

    min_steps_per_phase: int = 8
    """A phase that would be shorter than this is lengthened to it."""

    seq_divisor: int = 32
    """Every sequence length is divided by this, and rounded to a multiple of 16 from 64 on."""

    max_seq_length: int = 2048
    batch_tokens: int = 2048
    """Tokens per step where the recipe's batch is largest; other batches in proportion."""

    micro_batch_size: int = 4
    lr_power: float = 0.5
    """Rates and initial weights grow by (published width / shrunk width) ** lr_power."""

    ranks: int = 1
    """Model-parallel ranks the shrunk layout may use; axes are lowered until they fit."""

    evaluation_tokens: int = 8192
    """Tokens scored of each validation source."""

    corpus: str = ""
    """Folder with ``train/DOMAIN`` and ``validation/DOMAIN`` for sources that have no path."""

    domains: dict[str, str] = field(default_factory=dict)
    """Which domain of ``corpus`` stands for a source of this name."""

    validation: list[str] = field(default_factory=list)
    """Domains to validate on where the recipe names none."""

    def shrinks(self) -> bool:
        """Whether this is anything but the published size."""
        return self.parameters > 0


def shrink(run: Run, scale: ScaleConfig) -> Run:
    """``run`` at the size of ``scale``. Pure: neither argument is changed.

    Raises:
        ValueError: a phase has no tokens to shrink, or the model cannot be that small.
    """
    check_lengths(run.phases)
    model = shrink_model(
        run.model,
        parameters=scale.parameters,
        depth_factor=scale.depth_factor,
        vocab_size=scale.vocab_size,
        init_power=scale.lr_power,
    )
    model = replace(model, max_position_embeddings=_length(model.max_position_embeddings, scale))
    lr_factor = (run.model.hidden_size / model.hidden_size) ** scale.lr_power
    batch = replace(run.batch, seq_length=_length(run.batch.seq_length, scale))
    phases, micro = _shrink_phases(run, scale)
    first = phases[0].global_batch_size
    batch.global_batch_size, batch.micro_batch_size = first or micro, micro
    for phase, published in zip(phases, run.phases):
        if published.global_batch_size is None and phase.global_batch_size == first:
            phase.global_batch_size = None
    return replace(
        run,
        model=model,
        phases=[_scale_phase_rates(p, lr_factor) for p in phases],
        parallel=_shrink_layout(run.parallel, scale.ranks),
        optimizer=_scale_rates(run.optimizer, lr_factor),
        batch=batch,
        data=replace(
            run.data,
            sources=_located(run.data.sources, scale),
            validation=_validation(run, scale),
        ),
        evaluation=replace(run.evaluation, tokens_per_domain=scale.evaluation_tokens),
        checkpoint=replace(run.checkpoint, parent=""),
    )


def _length(tokens: int, scale: ScaleConfig) -> int:
    short = round(tokens / scale.seq_divisor / 16) * 16
    return min(max(short, MIN_SEQ_LENGTH), scale.max_seq_length, tokens)


def _located(sources: dict[str, SourceConfig], scale: ScaleConfig) -> dict[str, SourceConfig]:
    """Sources without a path read the domain that stands for their name."""
    found = {}
    for name, source in sources.items():
        if not source.path and name in scale.domains:
            domain = scale.domains[name]
            source = replace(source, path=f"{scale.corpus}/train/{domain}")
        found[name] = source
    return found


def _validation(run: RunConfig, scale: ScaleConfig) -> dict[str, SourceConfig]:
    if run.data.validation or run.data.synthetic:
        return run.data.validation
    return {d: SourceConfig(path=f"{scale.corpus}/validation/{d}") for d in scale.validation}


def _shrink_layout(parallel: ParallelConfig, ranks: int) -> ParallelConfig:
    """Axes lowered until TP x PP x CP fits: CP first, then TP, then PP."""
    pp = min(parallel.pipeline_model_parallel_size, ranks)
    tp = min(parallel.tensor_model_parallel_size, ranks // pp)
    cp = min(parallel.context_parallel_size, ranks // (pp * tp))
    return replace(
        parallel,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=None,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        sequence_parallel=parallel.sequence_parallel and tp > 1,
    )


def _sizes(run: RunConfig, phase: PhaseConfig) -> list[int]:
    """Every global batch size that a phase may take, first to last."""
    first = phase.global_batch_size or run.batch.global_batch_size
    grown = phase.batch_growth.max_global_batch_size
    return [first, *(s.global_batch_size for s in phase.batch_steps), *([grown] if grown else [])]


def _shrink_phases(run: RunConfig, scale: ScaleConfig) -> tuple[list[PhaseConfig], int]:
    """The phases with small batches and few tokens, and the micro batch that divides them all."""
    lengths = [p.seq_length or run.batch.seq_length for p in run.phases]
    largest = max(max(_sizes(run, p)) * s for p, s in zip(run.phases, lengths))
    share = scale.batch_tokens / largest
    sizes = [
        [_batch(size * length * share, _length(length, scale)) for size in _sizes(run, phase)]
        for phase, length in zip(run.phases, lengths)
    ]
    micro = min(scale.micro_batch_size, *(size for phase in sizes for size in phase))
    total = sum(p.tokens for p in run.phases)
    phases = []
    for phase, length, batches in zip(run.phases, lengths, sizes):
        short = _length(length, scale)
        steps = scale.tokens * phase.tokens / total / (batches[0] * short)
        tokens = max(round(steps), scale.min_steps_per_phase) * batches[0] * short
        phases.append(_shrink_phase(phase, tokens, short, batches))
    for i, factor in enumerate(_chain_factors(run.phases, phases)):
        phases[i].schedule = _shrink_schedule(phases[i].schedule, factor)
    return phases, micro


def _batch(tokens: float, seq_length: int) -> int:
    """Sequences nearest to ``tokens``: a power of two, so that micro batches always divide it."""
    return 2 ** max(round(math.log2(max(tokens / seq_length, 1))), 0)


def _shrink_phase(phase: PhaseConfig, tokens: int, length: int, batches: list[int]) -> PhaseConfig:
    factor = tokens / phase.tokens
    steps = [
        BatchStep(after_tokens=max(round(step.after_tokens * factor), i + 1), global_batch_size=b)
        for i, (step, b) in enumerate(zip(phase.batch_steps, batches[1:]))
    ]
    growth = replace(phase.batch_growth)
    if growth.max_global_batch_size:
        growth.max_global_batch_size = batches[-1]
        growth.patience_steps = max(growth.patience_steps // 10, 2)
    return replace(
        phase,
        tokens=tokens,
        seq_length=None if phase.seq_length is None else length,
        global_batch_size=batches[0],
        batch_steps=steps,
        batch_growth=growth,
    )


def _chain_factors(before: list[PhaseConfig], after: list[PhaseConfig]) -> list[float]:
    """For each phase, how much shorter the schedule it starts has become."""
    factors = []
    for i in range(len(before)):
        end = i + 1
        while end < len(before) and before[end].schedule.name == "continue":
            end += 1
        factors.append(sum(p.tokens for p in after[i:end]) / sum(p.tokens for p in before[i:end]))
    return factors


def _shrink_schedule(schedule: ScheduleConfig, factor: float) -> ScheduleConfig:
    def scaled(tokens: int | None) -> int | None:
        return None if tokens is None else max(round(tokens * factor), 1)

    return replace(
        schedule,
        warmup_tokens=round(schedule.warmup_tokens * factor),
        decay_tokens=round(schedule.decay_tokens * factor),
        horizon_tokens=scaled(schedule.horizon_tokens),
        decay_start_tokens=scaled(schedule.decay_start_tokens),
    )


def _scale_rates(optimizer: OptimizerConfig, factor: float) -> OptimizerConfig:
    return replace(optimizer, lr=optimizer.lr * factor, min_lr=optimizer.min_lr * factor)


def _scale_phase_rates(phase: PhaseConfig, factor: float) -> PhaseConfig:
    schedule = phase.schedule
    return replace(
        phase,
        schedule=replace(
            schedule,
            lr=None if schedule.lr is None else schedule.lr * factor,
            min_lr=None if schedule.min_lr is None else schedule.min_lr * factor,
            cooldown_lr=schedule.cooldown_lr * factor,
        ),
    )

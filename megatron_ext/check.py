"""Everything about a run that can be refused without torch, data or a GPU, in one call."""

import math
import re

from megatron_ext.config import RunConfig
from megatron_ext.devices import precision
from megatron_ext.legal import nearest_multiples, nearest_words
from megatron_ext.optim.schedule import check_schedules
from megatron_ext.parallel import overlap
from megatron_ext.train.config import check_batch, check_words
from megatron_ext.train.phases import Phase, Plan


def check_run(run: RunConfig, *, world_size: int) -> Plan:
    """The plan of a run that ``world_size`` ranks can train.

    Raises:
        ValueError: one sentence with the dotted key, the arithmetic and the nearest legal values.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run.name):
        raise ValueError(f"name={run.name!r} may hold letters, digits and . _ - only.")
    parts = (run.parallel, run.precision, run.kernels, run.optimizer, run.data, run.watch)
    for part in parts:
        part.check()
    _check_intervals(run)
    run.model.check(run.parallel)
    plan = check_phases(run, data_parallel_size=run.parallel.data_parallel_size(world_size))
    overlap.check(run)
    precision.check(run, seq_lengths=[phase.seq_length for phase in plan.phases])
    return plan


def check_phases(run: RunConfig, *, data_parallel_size: int = 1) -> Plan:
    """What ``check_run`` says of the phases; without a world size, of one model replica.

    Raises:
        ValueError: as ``check_run``.
    """
    plan = Plan.of(run)
    check_schedules(run.phases, run.optimizer)
    for phase in plan.phases:
        _check_phase(run, phase, data_parallel_size)
    return plan


def _check_intervals(run: RunConfig) -> None:
    """Refuse counts of steps that mean nothing."""
    least = {
        "checkpoint.interval_steps": 1,
        "checkpoint.keep": 1,
        "logging.interval_steps": 1,
        "logging.progress_interval_steps": 1,
        "logging.gradient_share_interval": 0,
        "evaluation.interval_steps": 0,
        "evaluation.tokens_per_domain": 1,
    }
    for key, lowest in least.items():
        part, _, name = key.partition(".")
        if (value := getattr(getattr(run, part), name)) < lowest:
            raise ValueError(f"{key}={value} must be at least {lowest}.")
    if run.seed < 0:
        raise ValueError(f"seed={run.seed} must not be negative.")


def _check_phase(run: RunConfig, phase: Phase, data_parallel_size: int) -> None:
    key = f"phases.{phase.index}"
    check_words(key, phase.config)
    if not 1 < phase.rotary_base < math.inf:
        own = phase.config.rotary_base is not None
        raise ValueError(
            f"{f'{key}.rotary_base' if own else 'model.rotary_base'}={phase.rotary_base:g} must "
            f"be a number above 1: channel pair i turns by base ** (-2 i / D) a token."
        )
    _check_sequence(run, phase)
    _check_batches(run, phase, data_parallel_size)
    _check_mixture(run, phase, key)


def _check_sequence(run: RunConfig, phase: Phase) -> None:
    parallel, length = run.parallel, phase.seq_length
    key = f"phases.{phase.index}.seq_length" if phase.config.seq_length else "batch.seq_length"
    pieces, rule = 1, ""
    if parallel.sequence_parallel:
        pieces = parallel.tensor_model_parallel_size
        rule = f"parallel.tensor_model_parallel_size={pieces}"
    if (cp := parallel.context_parallel_size) > 1:
        pieces, rule = pieces * 2 * cp, (f"{rule} * " if rule else "") + f"2 * CP = 2 * {cp}"
    if length < 1 or length % pieces:
        raise ValueError(
            f"{key}={length} is not a multiple of {rule or 1} = {pieces}: use "
            f"{nearest_multiples(pieces, length)}."
        )


def _check_batches(run: RunConfig, phase: Phase, data_parallel_size: int) -> None:
    micro, key = run.batch.micro_batch_size, f"phases.{phase.index}"
    if micro < 1:
        raise ValueError(f"batch.micro_batch_size={micro} must be at least 1.")
    per_pass = micro * data_parallel_size
    arithmetic = f"{micro}*{data_parallel_size}"
    own = phase.config.global_batch_size is not None
    first = f"{key}.global_batch_size" if own else "batch.global_batch_size"
    check_batch(first, phase.first_batch, per_pass, arithmetic)
    growth = phase.config.batch_growth.max_global_batch_size
    if growth:
        name = f"{key}.batch_growth.max_global_batch_size"
        check_batch(name, growth, per_pass, arithmetic)
    before = -1
    for number, step in enumerate(phase.config.batch_steps):
        name = f"{key}.batch_steps.{number}"
        check_batch(f"{name}.global_batch_size", step.global_batch_size, per_pass, arithmetic)
        if step.after_tokens <= before or step.after_tokens >= phase.config.tokens:
            raise ValueError(
                f"{name}.after_tokens={step.after_tokens} must lie above {before} and below "
                f"{key}.tokens={phase.config.tokens}: steps are in order, inside the phase."
            )
        before = step.after_tokens
    stages = run.parallel.pipeline_model_parallel_size
    if run.parallel.virtual_pipeline_model_parallel_size:
        sizes = [phase.first_batch, *(s.global_batch_size for s in phase.config.batch_steps)]
        for size in sizes:
            if (size // per_pass) % stages:
                raise ValueError(
                    f"interleaving needs a number of micro-batches that is a multiple of "
                    f"parallel.pipeline_model_parallel_size={stages}: {size} / ({arithmetic}) = "
                    f"{size // per_pass}; use a global batch of "
                    f"{nearest_multiples(per_pass * stages, size)}."
                )


def _check_mixture(run: RunConfig, phase: Phase, key: str) -> None:
    for field in ("mixture", "mixture_end"):
        shares: dict[str, float] = getattr(phase.config, field)
        for source, share in shares.items():
            if source not in run.data.sources:
                near = nearest_words(source, run.data.sources) or sorted(run.data.sources)
                raise ValueError(
                    f"{key}.{field}.{source}={share} names no source of data.sources: known are "
                    f"{', '.join(near) or 'none'}."
                )
            if not 0 <= share <= 1:
                raise ValueError(f"{key}.{field}.{source}={share} must lie between 0 and 1.")
        total = sum(shares.values())
        if shares and abs(total - 1) > 1e-6:
            parts = " + ".join(f"{v:g}" for v in shares.values())
            raise ValueError(f"{key}.{field} must sum to 1, but {parts} = {total:.6g}.")
    if phase.config.mixture_end and not phase.config.mixture:
        raise ValueError(f"{key}.mixture_end needs {key}.mixture to ramp from.")
    if not 0 < phase.config.ramp_power < math.inf:
        raise ValueError(
            f"{key}.ramp_power={phase.config.ramp_power} must be a number above 0: shares are "
            f"start + (end - start) * x ** ramp_power."
        )

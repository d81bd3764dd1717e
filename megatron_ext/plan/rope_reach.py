"""How long a context a RoPE base carries: the reach rule of arXiv:2310.05209.

A model trained on ``trained`` tokens has seen whole turns of its faster channels only. With a
larger base, every channel up to the last of those (the critical dimension) turns slower, and the
longest context is the period of that channel.
"""

import math
from pathlib import Path

from megatron_ext.checkpoint.parent import trained_length
from megatron_ext.config import RunConfig
from megatron_ext.train.phases import Plan


def reach(base: float, *, rotary_dim: int, trained: int, trained_base: float = 10000.0) -> float:
    """Tokens up to which ``base`` extrapolates, after training on ``trained`` at ``trained_base``.

    ``2 pi base ** (2 / d * ceil(d / 2 * log(trained / 2 pi) / log(trained_base)))``.
    """
    return 2 * math.pi * base ** _exponent(rotary_dim, trained, trained_base)


def smallest_base(
    context: int, *, rotary_dim: int, trained: int, trained_base: float = 10000.0
) -> float:
    """The base whose reach is ``context`` tokens."""
    return (context / (2 * math.pi)) ** (1 / _exponent(rotary_dim, trained, trained_base))


def _exponent(rotary_dim: int, trained: int, trained_base: float) -> float:
    turns = math.log(trained / (2 * math.pi)) / math.log(trained_base)
    return max(math.ceil(rotary_dim / 2 * turns), 1) * 2 / rotary_dim


def warnings(run: RunConfig, *, trained: int | None = None) -> list[str]:
    """One sentence for every phase whose sequences outrun its base.

    ``trained`` is the length before the run; without it what ``checkpoint.load`` says of itself,
    and else the run's own first phase.
    """
    plan, found = Plan.of(run), []
    rotary_dim = int(run.model.head_dim() * run.model.rotary_percent)
    length = trained or _before(run) or plan.phases[0].seq_length
    base = run.model.rotary_base
    for phase in plan.phases:
        if phase.seq_length <= length:
            continue
        at = {"rotary_dim": rotary_dim, "trained": length, "trained_base": base}
        far = reach(phase.rotary_base, **at)  # type: ignore[arg-type]
        if far < phase.seq_length:
            need = smallest_base(phase.seq_length, **at)  # type: ignore[arg-type]
            found.append(
                f"phases.{phase.index}.rotary_base={phase.rotary_base:g} reaches about {far:,.0f} "
                f"tokens after training on {length:,}, and its sequences have "
                f"{phase.seq_length:,}: use at least {need:,.0f} (arXiv:2310.05209)."
            )
    return found


def _before(run: RunConfig) -> int | None:
    """Length that the checkpoint to go on from was trained at; None where it cannot be read.

    Whether it can be used is for those who load it to say.
    """
    try:
        return trained_length(Path(run.checkpoint.load)) if run.checkpoint.load else None
    except (ValueError, OSError):
        return None

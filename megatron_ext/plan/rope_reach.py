"""How long a context a RoPE base carries: the reach rule of arXiv:2310.05209.

A model trained on ``trained`` tokens has seen whole turns of its faster channels only. With a
larger base, every channel up to the last of those (the critical dimension) turns slower, and the
longest context is the period of that channel.
"""

import math

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
    return math.ceil(rotary_dim / 2 * turns) * 2 / rotary_dim


def warnings(run: RunConfig, *, trained: int | None = None) -> list[str]:
    """One sentence for every phase whose sequences outrun its base.

    ``trained`` is the length before the run; without it the run's own first phase counts.
    """
    plan, found = Plan.of(run), []
    rotary_dim = int(run.model.head_dim() * run.model.rotary_percent)
    length, base = trained or plan.phases[0].seq_length, run.model.rotary_base
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

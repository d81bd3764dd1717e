"""Learning-rate schedules: each a pure function of the tokens its phase consumed before the step.

Notation: t tokens before the step, W warmup_tokens, H horizon_tokens, D decay_tokens,
P the peak (lr), m the floor (min_lr). Every schedule rises as ``P * t / W`` for t < W.
A phase named ``continue`` goes on with the schedule of the phase before it, at
t = tokens of that phase + its own. Lengths are the configured ones: a phase whose last step
overshoots them starts the next phase at most one step early on the shared curve.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ext.optim.config import OptimizerConfig, ScheduleConfig


class Stretch(Protocol):
    """What a schedule needs to know of a phase."""

    tokens: int
    schedule: ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A schedule with every default filled in from its phase and the optimizer."""

    shape: ScheduleConfig
    peak: float
    floor: float
    length: int
    """Tokens of the phase and of all phases that continue it."""

    @property
    def horizon(self) -> int:
        """Tokens after which the schedule has reached its end."""
        return self.shape.horizon_tokens or self.length

    @property
    def decay_start(self) -> int:
        """Where the decay of ``wsd`` or the cooldown of ``stablelm2`` begins."""
        if self.shape.decay_start_tokens is not None:
            return self.shape.decay_start_tokens
        end = self.length if self.shape.name == "stablelm2" else self.horizon
        return end - self.shape.decay_tokens


def constant(t: int, curve: Curve) -> float:
    """P. After a warmup this is the stable part of MiniCPM's WSD (arXiv:2404.06395)."""
    return curve.peak


def linear(t: int, curve: Curve) -> float:
    """P * (1 - x) + m * x with x = (t - W) / (H - W); the decay of BERT (arXiv:1810.04805)."""
    x = _progress(t, curve)
    return curve.peak * (1 - x) + curve.floor * x


def cosine(t: int, curve: Curve) -> float:
    """m + (P - m) / 2 * (1 + cos(pi * (t - W) / (H - W))): SGDR's first cycle (arXiv:1608.03983).

    With the floor at P / 10 it is LLaMA's (arXiv:2302.13971) and Skywork's stage 1.
    """
    swing = (curve.peak - curve.floor) / 2
    return curve.floor + swing * (1 + math.cos(math.pi * _progress(t, curve)))


def inverse_sqrt(t: int, curve: Curve) -> float:
    """max(m, P * sqrt(W / t)): the Transformer's decay (arXiv:1706.03762), needs a warmup."""
    return max(curve.floor, curve.peak * math.sqrt(curve.shape.warmup_tokens / t))


def wsd(t: int, curve: Curve) -> float:
    """P until the decay starts, then m + (P - m) * f(x), x the share of D that has passed.

    Warmup-stable-decay is MiniCPM's (arXiv:2404.06395), used by Index-1.9B. f is the ``decay``
    word: ``linear`` 1 - x, ``cosine`` (1 + cos(pi x)) / 2, ``exponential`` 2 * 0.5 ** x - 1
    (Megatron's form: MiniCPM's half-life moved to end at the floor), ``1-sqrt`` 1 - sqrt(x)
    (arXiv:2405.18392, which found it best).
    """
    x = _share(t - curve.decay_start, curve.shape.decay_tokens)
    return curve.floor + (curve.peak - curve.floor) * DECAY_SHAPES[curve.shape.decay](x)


def stablelm2(t: int, curve: Curve) -> float:
    """Cosine, then reciprocal square root, then linear cooldown: StableLM-2 (arXiv:2402.17834).

    With F = cosine_fraction: m + (P - m) / 2 * (1 + cos(2 pi t / H)) for t <= F H; then
    alpha / sqrt(t + beta), where alpha and beta give both branches one value and one slope at
    F H; from decay_start_tokens on, straight to cooldown_lr over D. The published run has
    F = 1/4. The cosine counts from t = 0, not from W, so the end of the warmup is 0.3 % above it.
    """
    if curve.shape.decay_tokens and t >= curve.decay_start:
        x = _share(t - curve.decay_start, curve.shape.decay_tokens)
        start = _stablelm2_body(curve.decay_start, curve)
        return start * (1 - x) + curve.shape.cooldown_lr * x
    return _stablelm2_body(t, curve)


def _stablelm2_body(t: int, curve: Curve) -> float:
    horizon, swing = curve.horizon, (curve.peak - curve.floor) / 2
    join = curve.shape.cosine_fraction * horizon
    if t <= join:
        return curve.floor + swing * (1 + math.cos(2 * math.pi * t / horizon))
    angle = 2 * math.pi * curve.shape.cosine_fraction
    value = curve.floor + swing * (1 + math.cos(angle))
    fall = swing * 2 * math.pi / horizon * math.sin(angle)
    # d/dt alpha / sqrt(t + beta) = -value / (2 (t + beta)), so equal slopes at the join fix beta.
    beta = value / (2 * fall) - join
    alpha = value * math.sqrt(join + beta)
    return alpha / math.sqrt(t + beta)


def _share(part: int, whole: int) -> float:
    """``part / whole`` kept within 0..1; a whole of 0 has passed as soon as it starts."""
    if part <= 0:
        return 0.0
    return 1.0 if part >= whole else part / whole


def _progress(t: int, curve: Curve) -> float:
    warmup = curve.shape.warmup_tokens
    return _share(t - warmup, curve.horizon - warmup)


DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "exponential": lambda x: 2 * 0.5**x - 1,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}

FORMULAS: dict[str, Callable[[int, Curve], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
    "stablelm2": stablelm2,
}


def curve_of(phases: Sequence[Stretch], optimizer: OptimizerConfig, phase: int) -> Curve:
    """The curve that ``phase`` starts, with the optimizer's rates where it states none."""
    shape = phases[phase].schedule
    length = phases[phase].tokens
    for follower in phases[phase + 1 :]:
        if follower.schedule.name != "continue":
            break
        length += follower.tokens
    peak = optimizer.lr if shape.lr is None else shape.lr
    floor = min(optimizer.min_lr, peak) if shape.min_lr is None else shape.min_lr
    return Curve(shape=shape, peak=peak, floor=floor, length=length)


def learning_rate(
    phases: Sequence[Stretch], optimizer: OptimizerConfig, *, phase: int, phase_tokens: int
) -> float:
    """The rate of the step that ``phase`` takes after consuming ``phase_tokens``."""
    tokens = phase_tokens
    while phases[phase].schedule.name == "continue":
        phase -= 1
        tokens += phases[phase].tokens
    curve = curve_of(phases, optimizer, phase)
    if tokens < curve.shape.warmup_tokens:
        return curve.peak * tokens / curve.shape.warmup_tokens
    return FORMULAS[curve.shape.name](tokens, curve)


def check_schedules(phases: Sequence[Stretch], optimizer: OptimizerConfig) -> None:
    """Refuse schedules that do not fit their phases.

    Raises:
        ValueError: naming the dotted key, the arithmetic and the way out.
    """
    for i, phase in enumerate(phases):
        key = f"phases.{i}.schedule"
        phase.schedule.check(key)
        if phase.schedule.name == "continue":
            _check_continue(key, i, phase.schedule)
        else:
            _check_curve(key, curve_of(phases, optimizer, i))


def _check_continue(key: str, phase: int, shape: ScheduleConfig) -> None:
    if phase == 0:
        raise ValueError(
            f"{key}.name=continue has no phase before it to go on with: name a schedule."
        )
    for name in ("lr", "min_lr", "horizon_tokens", "decay_start_tokens"):
        if getattr(shape, name) is not None:
            raise ValueError(
                f"{key}.{name}={getattr(shape, name)} would have no effect under "
                f"{key}.name=continue: set it on the phase that starts the schedule."
            )


def _check_curve(key: str, curve: Curve) -> None:
    shape, warmup = curve.shape, curve.shape.warmup_tokens
    if not 0 <= curve.floor <= curve.peak or curve.peak <= 0:
        raise ValueError(
            f"{key}.min_lr={curve.floor:g} must lie between 0 and {key}.lr={curve.peak:g}, "
            f"and the latter above 0."
        )
    if warmup > min(curve.length, curve.horizon):
        raise ValueError(
            f"{key}.warmup_tokens={warmup} is longer than the phase ({curve.length} tokens) or "
            f"its horizon ({curve.horizon}): use at most {min(curve.length, curve.horizon)}."
        )
    if shape.name == "inverse_sqrt" and not warmup:
        raise ValueError(f"{key}.warmup_tokens=0: inverse_sqrt scales by it, give it a length.")
    if shape.name == "wsd" and not shape.decay_tokens:
        raise ValueError(f"{key}.name=wsd needs {key}.decay_tokens above 0: it never decays.")
    if shape.name in ("wsd", "stablelm2") and curve.decay_start < warmup:
        raise ValueError(
            f"{key}.decay_tokens={shape.decay_tokens} starts the decay at token "
            f"{curve.decay_start}, before the warmup ends at {warmup}: shorten one of them."
        )
    if shape.name == "stablelm2" and not 0 < shape.cosine_fraction < 0.5:
        raise ValueError(
            f"{key}.cosine_fraction={shape.cosine_fraction} must lie between 0 and 0.5: beyond "
            f"half a period the cosine rises and no inverse root continues it."
        )
    if shape.name == "stablelm2" and curve.floor >= curve.peak:
        raise ValueError(
            f"{key}.min_lr={curve.floor:g} must be below {key}.lr={curve.peak:g} for stablelm2."
        )

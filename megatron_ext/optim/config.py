"""Optimizer settings, and one phase's learning-rate schedule."""

from dataclasses import dataclass

from megatron_ext.legal import unknown_choice

SCHEDULES = (
    "constant",
    "linear",
    "cosine",
    "inverse_sqrt",
    "wsd",
    "stablelm2",
    "continue",
)
DECAYS = ("linear", "cosine", "exponential", "1-sqrt")


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW, under Megatron's own names."""

    lr: float = 3e-4
    """Peak learning rate of every phase that does not state its own."""

    min_lr: float = 0.0
    """Floor of every phase's schedule that does not state its own."""

    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled decay; not applied to norms and biases."""

    clip_grad: float = 1.0
    """Largest global L2 norm of the gradient; 0 never clips."""

    def check(self) -> None:
        """Refuse rates and coefficients outside their range.

        Raises:
            ValueError: naming the dotted key and the rule.
        """
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr={self.lr} must be above 0.")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"optimizer.min_lr={self.min_lr} must lie between 0 and optimizer.lr={self.lr}."
            )
        for key in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"optimizer.{key}={getattr(self, key)} must lie in [0, 1).")


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate over the tokens of one phase. Formulas: megatron_ext/optim/schedule.py."""

    name: str = "constant"
    """One of the SCHEDULES; ``continue`` goes on with the schedule of the phase before."""

    lr: float | None = None
    """Peak; None takes optimizer.lr."""

    min_lr: float | None = None
    """Floor; None takes optimizer.min_lr."""

    warmup_tokens: int = 0
    """Tokens over which the rate first rises linearly from 0 to the peak."""

    horizon_tokens: int | None = None
    """Tokens after which the schedule reaches its floor; None is the phase's own length."""

    decay: str = "linear"
    """Shape of the decay of ``wsd``, one of the DECAYS."""

    decay_tokens: int = 0
    """Length of the decay of ``wsd``, and of the linear cooldown of ``stablelm2``."""

    decay_start_tokens: int | None = None
    """Where that decay starts; None lets it end with the horizon (wsd) or phase (stablelm2)."""

    cooldown_lr: float = 0.0
    """Rate at which the linear cooldown of ``stablelm2`` ends."""

    cosine_fraction: float = 0.25
    """Share of the horizon that ``stablelm2`` follows the cosine before the inverse root."""

    def check(self, key: str) -> None:
        """Refuse unknown words and impossible lengths; ``key`` is the dotted path of this part.

        Raises:
            ValueError: naming the dotted key and the rule.
        """
        if self.name not in SCHEDULES:
            raise unknown_choice(f"{key}.name", self.name, SCHEDULES)
        if self.decay not in DECAYS:
            raise unknown_choice(f"{key}.decay", self.decay, DECAYS)
        for name in ("warmup_tokens", "decay_tokens", "decay_start_tokens", "cooldown_lr"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{key}.{name}={getattr(self, name)} must not be negative.")
        if self.horizon_tokens is not None and self.horizon_tokens < 1:
            raise ValueError(f"{key}.horizon_tokens={self.horizon_tokens} must be at least 1.")

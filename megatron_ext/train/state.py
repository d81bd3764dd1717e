"""Where a run stands: everything besides tensors that a resume needs, as plain JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(kw_only=True)
class TrainState:
    """Counted after the last finished step."""

    step: int = 0
    tokens: int = 0
    samples: int = 0

    phase: int = 0
    """Index of the phase that the next step belongs to."""

    phase_step: int = 0
    phase_tokens: int = 0
    phase_samples: int = 0
    """Address of the next sample within the phase: resuming needs no replay."""

    ledger: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each source had given when the phase began (megatron_ext/data/ledger.py)."""

    growth: dict[str, Any] = field(default_factory=dict)
    """State of the batch growth on plateaus, empty where the phase has none."""

    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Windows of data that were skipped on purpose, each with its reason."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "TrainState":
        """The exact inverse of ``as_dict``."""
        return cls(**stored)

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
    """Address of the next sample, counted from the anchor: resuming needs no replay."""

    anchor_tokens: int = 0
    """Tokens of the phase at which ``ledger`` was taken: 0, or where its feeding was changed."""

    numbering: str = ""
    """Names what ``phase_samples`` counts (train/saving.py): another anchor or mixture, another
    name. Filled in when a phase is entered."""

    ledger: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each source had given at the anchor (megatron_ext/data/ledger.py)."""

    consumed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each source has given by now. Filled in when saved."""

    growth: dict[str, Any] = field(default_factory=dict)
    """State of the batch growth on plateaus, empty where the phase has none."""

    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Windows of data that were skipped on purpose, each with its reason."""

    recent_losses: list[float] = field(default_factory=list)
    recent_norms: list[float] = field(default_factory=list)
    """Of the last ``watch.spike_window_steps`` steps: what the next one is compared with."""

    @property
    def place(self) -> tuple[int, str, int]:
        """Of the next step in the text: equal for equal samples, in whichever attempt."""
        return self.phase, self.numbering, self.phase_samples

    def rebase(self) -> None:
        """Anchor the ledger here: from now on the phase draws other windows than before.

        Everything consumed so far stays consumed, so nothing is repeated or left out.
        """
        self.ledger, self.anchor_tokens = self.consumed, self.phase_tokens
        self.phase_samples = 0
        self.skipped = [s for s in self.skipped if s["phase"] != self.phase]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "TrainState":
        """The exact inverse of ``as_dict``."""
        return cls(**stored)

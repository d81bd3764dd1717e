"""What follows a failure, and what is watched for, as plain data."""

import math
from dataclasses import dataclass, field

from megatron_ext.legal import unknown_choice
from megatron_ext.resilience.drill import DrillConfig

ON_BAD_STEP = ("stop", "skip", "rewind")
ENOUGH = 16  # steps before a median of losses or norms means something
NONE_AT_0 = {
    "max_interventions": "to stop at the first",
    "replica_interval_steps": "no checksums",
    "straggler_interval_steps": "no comparisons",
}


@dataclass(kw_only=True)
class RestartConfig:
    """When an attempt that ended is followed by another (docs/restart.md)."""

    no_progress: int = 3
    """Attempts with the same root cause and no new checkpoint before the run stops."""

    ceiling: int = 6
    """Attempts without a new checkpoint, whatever their causes, before the run stops."""

    in_job: int = 10
    """Times the ranks are started again inside one step before the step is given up."""

    backoff_seconds: int = 10
    """Wait before a second try of the same root; doubles each time, to at most ten minutes."""

    strikes: int = 2
    """Failures on one node that set it aside."""

    exclude_percent: int = 10
    """Share of the nodes that may be set aside in a day; one node always may."""

    log_only: bool = False
    """Record what would be done, and do nothing: the run then ends at its first failure."""

    def check(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ValueError: naming the dotted key, the value and the rule.
        """
        least = {"no_progress": 1, "ceiling": 1, "in_job": 0, "backoff_seconds": 0, "strikes": 1}
        for key, lowest in least.items():
            if (value := getattr(self, key)) < lowest:
                raise ValueError(f"slurm.restart.{key}={value} must be at least {lowest}.")
        if not 0 <= self.exclude_percent <= 100:
            raise ValueError(
                f"slurm.restart.exclude_percent={self.exclude_percent} must lie between 0 and 100."
            )


@dataclass(kw_only=True)
class WatchConfig:
    """What is watched while a run trains (docs/reliability.md)."""

    hang: bool = True
    """Start the ranks again when one makes no progress for longer than its deadline."""

    hang_floor_seconds: float = 5.0
    """A step that stands still is named within 3 x the 99th percentile of its kind plus this, of
    which the last two seconds go to the stacks of all ranks."""

    hang_unlearnt_seconds: float = 900.0
    """Deadline of a section that has been seen fewer than ten times."""

    on_bad_step: str = "skip"
    """After a NaN, Inf or spike that stays when the step is run again: ``stop``, ``skip`` the
    step's samples, or ``rewind`` to the newest checkpoint and pass over all samples since."""

    rerun_elsewhere: bool = True
    """Take a step whose NaN or Inf stays, on one node alone, once more without that node before
    ``on_bad_step``, where Slurm has a spare one. Sound there: the node is at fault."""

    spike_factor: float = 10.0
    """A loss above this times the running median is a spike; 0 never. In a window with peaks of
    its own it takes more: twice the square of the largest over the median."""

    grad_spike_factor: float = 10.0
    """The same for the gradient norm, before clipping."""

    spike_window_steps: int = 128
    """Steps that the running medians are taken over."""

    max_interventions: int = 10
    """Skips and rewinds before the run stops and asks for a person."""

    replica_interval_steps: int = 100
    """Steps between checksums over data-parallel replicas; 0 never."""

    straggler_interval_steps: int = 10
    """Steps between comparisons of the ranks' own time; 0 never. A rank is named after three."""

    straggler_factor: float = 1.4
    """Own time over the median of the peers' above which a rank is slow (NVRx: 1 / 0.7)."""

    straggler_strikes: bool = False
    """A node with a slow rank gets a strike when the attempt ends (``slurm.restart.strikes``)."""

    drill: list[DrillConfig] = field(default_factory=list)
    """Faults to strike on purpose. A real run has none."""

    def check(self) -> None:
        """Refuse words and numbers that mean nothing.

        Raises:
            ValueError: naming the dotted key, the value and the rule.
        """
        if self.on_bad_step not in ON_BAD_STEP:
            raise unknown_choice("watch.on_bad_step", self.on_bad_step, ON_BAD_STEP)
        for fault in self.drill:
            fault.check()
        for key in ("spike_factor", "grad_spike_factor"):
            if (factor := getattr(self, key)) and not factor > 1:
                raise ValueError(
                    f"watch.{key}={factor} is not above 1: every other step would be a spike. "
                    f"Use 0 to look for none."
                )
        if self.spike_window_steps < ENOUGH:
            raise ValueError(
                f"watch.spike_window_steps={self.spike_window_steps} must be at least {ENOUGH}: a "
                f"median of fewer steps means nothing. Use watch.spike_factor=0 and "
                f"watch.grad_spike_factor=0 to look for no spikes."
            )
        for key, none in NONE_AT_0.items():
            if (value := getattr(self, key)) < 0:
                raise ValueError(f"watch.{key}={value} must be at least 0, which is {none}.")
        for key in ("hang_floor_seconds", "hang_unlearnt_seconds"):
            if not 0 < (value := getattr(self, key)) < math.inf:
                raise ValueError(
                    f"watch.{key}={value} must be a number above 0. Use watch.hang=false to look "
                    f"for no hangs."
                )
        if not self.straggler_factor > 1:
            raise ValueError(
                f"watch.straggler_factor={self.straggler_factor} is not above 1: some rank would "
                f"always be slow. Use watch.straggler_interval_steps=0 to look for none."
            )

"""A job: one run, and where and how it is started."""

from dataclasses import dataclass, field

from launch.cluster_config import ClusterConfig, SlurmConfig
from megatron_ext.config import RunConfig
from megatron_ext.plan.scale import ScaleConfig


@dataclass(kw_only=True)
class LaunchConfig:
    """How ``python -m launch.train`` starts ranks where no launcher did."""

    nproc: int = 1
    """Ranks to start on this machine. Ignored under torchrun and srun, which bring theirs."""

    threads_per_rank: int | None = None
    """CPU threads of each rank; None shares the cores out evenly."""


@dataclass(kw_only=True)
class JobConfig(RunConfig):
    """The run, plus what only the launchers read."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """What the recipe was shrunk to; already applied when a run starts."""

    composed_from: dict[str, str] = field(default_factory=dict)
    """The choice made in each config group, for the reader of a saved config."""

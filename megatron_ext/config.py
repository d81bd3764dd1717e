"""What a run is, as plain data. Hydra fills it in; nothing below launch/ sees a DictConfig."""

from dataclasses import dataclass, field

from megatron_ext.data.config import DataConfig
from megatron_ext.devices.config import KernelsConfig, PrecisionConfig
from megatron_ext.models.config import ModelConfig
from megatron_ext.optim.config import OptimizerConfig
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.resilience.config import WatchConfig
from megatron_ext.train.config import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    PhaseConfig,
)


@dataclass(kw_only=True)
class RunConfig:
    """One training run, whole. Saved beside its checkpoints exactly as it was used."""

    name: str
    """Names the run folder when ``run_dir`` does not. Letters, digits and ``._-`` only."""

    run_dir: str = ""
    """Folder of everything the run leaves behind; empty is ``runs/<name>``."""

    seed: int = 1234
    """Seeds initial weights, data order and dropout-free RNG streams."""

    model: ModelConfig
    phases: list[PhaseConfig]
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def folder(self) -> str:
        """The run folder."""
        return self.run_dir or f"runs/{self.name}"

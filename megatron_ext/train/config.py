"""Phases, batches and what surrounds a step: the run over time, as plain data."""

from dataclasses import dataclass, field

from megatron_ext.data.config import PACKINGS
from megatron_ext.legal import nearest_multiples, unknown_choice
from megatron_ext.optim.config import ScheduleConfig

OPTIMIZER_STATES = ("keep", "reset")
PLATEAU_TESTS = ("best", "slope")


@dataclass(kw_only=True)
class BatchConfig:
    """What one optimizer step consumes, and in what pieces. A phase may override two of these."""

    global_batch_size: int = 8
    """Sequences per optimizer step, over the whole job."""

    micro_batch_size: int = 1
    """Sequences that go through the model at a time on one data-parallel rank."""

    seq_length: int = 4096
    """Tokens per sequence, before any context-parallel slicing."""


@dataclass(kw_only=True)
class BatchStep:
    """From ``after_tokens`` of the phase on, steps take ``global_batch_size`` sequences."""

    after_tokens: int
    global_batch_size: int


@dataclass(kw_only=True)
class PlateauGrowth:
    """Yi-9B's rule: the batch grows whenever the loss plateaus. Its batch sizes are UNKNOWN.

    A phase that states no batch of its own goes on with the one that the phase before had grown.
    """

    factor: float = 2.0
    """The next batch is this times the present one."""

    max_global_batch_size: int = 0
    """Growth stops here; 0 never grows."""

    patience_steps: int = 100
    """Steps without improvement that count as a plateau."""

    threshold: float = 0.001
    """Relative fall of the smoothed loss that counts as improvement."""

    test: str = "best"
    """``best``: no improvement on the best for that long. ``slope``: too small a fall over it."""

    smoothing_steps: int = 20
    """Span of the exponential mean that the test sees; it restarts when the batch grows."""

    def check(self, key: str) -> None:
        """Refuse settings under which growth could not work; ``key`` is the dotted path.

        Raises:
            ValueError: naming the dotted key and the rule.
        """
        if self.test not in PLATEAU_TESTS:
            raise unknown_choice(f"{key}.test", self.test, PLATEAU_TESTS)
        if self.factor <= 1:
            raise ValueError(f"{key}.factor={self.factor} must be above 1.")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"{key}.threshold={self.threshold} must lie in [0, 1).")
        for name in ("patience_steps", "smoothing_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{key}.{name}={getattr(self, name)} must be at least 1.")


@dataclass(kw_only=True)
class PhaseConfig:
    """One stretch of a run in which nothing but its own schedules changes."""

    name: str = ""
    """Shown in logs and pictures; empty is ``phase0``, ``phase1``, ..."""

    tokens: int
    """Length. Rounded up to whole steps."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    mixture: dict[str, float] = field(default_factory=dict)
    """Share of tokens from each source, summing to 1; empty is in proportion to their sizes."""

    mixture_end: dict[str, float] = field(default_factory=dict)
    """Shares at the end of the phase, when they ramp from ``mixture``; empty keeps them."""

    ramp_power: float = 1.0
    """Share at fraction x of the phase is start + (end - start) * x ** ramp_power."""

    global_batch_size: int | None = None
    """Sequences per step in this phase; None takes batch.global_batch_size."""

    batch_steps: list[BatchStep] = field(default_factory=list)
    """Batch growth at set tokens."""

    batch_growth: PlateauGrowth = field(default_factory=PlateauGrowth)
    """Batch growth at loss plateaus."""

    seq_length: int | None = None
    """Tokens per sequence in this phase; None takes batch.seq_length."""

    rotary_base: float | None = None
    """RoPE theta from this phase on; None keeps the one before."""

    packing: str = "crossdoc"
    """``crossdoc`` lets attention cross documents; ``document`` resets it at their ends."""

    optimizer_state: str = "keep"
    """``reset`` starts the phase with zero Adam moments."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """Validation loss per domain, inside the loop."""

    interval_steps: int = 0
    """Steps between evaluations; 0 evaluates only at the end of each phase."""

    tokens_per_domain: int = 65536
    """Tokens scored of each validation source."""


@dataclass(kw_only=True)
class LoggingConfig:
    """What is reported, how often."""

    interval_steps: int = 1
    """Steps between lines of metrics.jsonl and points in TensorBoard."""

    progress_interval_steps: int = 1
    """Steps between lines of progress on the terminal."""

    tensorboard: bool = True
    gradient_share_interval: int = 10
    """Steps between looks at each layer's share of the squared gradient norm; 0 never looks."""

    mfu_convention: str = "full"
    """``full`` counts the whole attention square, ``causal`` half of it."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When and where state is saved."""

    interval_steps: int = 1000
    """Steps between checkpoints. The end of a phase, a stop request and the end always save."""

    keep: int = 2
    """Newest verified checkpoints that stay; ends of phases always do."""

    asynchronous: bool = False
    """Copy to host memory, then write while training goes on."""

    load: str = ""
    """A checkpoint of another run to start from; empty starts fresh. Resuming needs no setting."""

    load_optimizer: bool = True
    """Take the optimizer state of ``checkpoint.load`` too, not only the weights."""

    parent: str = ""
    """What a continued stage starts from, in words: with it, an empty ``load`` is refused."""


def check_lengths(phases: list[PhaseConfig]) -> None:
    """Refuse a run without tokens.

    Raises:
        ValueError: naming the phase.
    """
    if not phases:
        raise ValueError("phases is empty: a run needs at least one phase with tokens.")
    for index, phase in enumerate(phases):
        if phase.tokens < 1:
            raise ValueError(f"phases.{index}.tokens={phase.tokens} must be at least 1.")


def check_batch(key: str, size: int, per_pass: int, arithmetic: str) -> None:
    """Refuse a global batch that does not divide into whole passes.

    Raises:
        ValueError: naming ``key``, the arithmetic and the nearest legal sizes.
    """
    if size < 1 or size % per_pass:
        raise ValueError(
            f"{key}={size} is not a multiple of batch.micro_batch_size*data_parallel_size = "
            f"{arithmetic} = {per_pass}: use {nearest_multiples(per_pass, size)}."
        )


def check_words(key: str, phase: PhaseConfig) -> None:
    """Refuse unknown packing and optimizer-state words; ``key`` is the phase's dotted path.

    Raises:
        ValueError: naming the dotted key and the known words.
    """
    if phase.packing not in PACKINGS:
        raise unknown_choice(f"{key}.packing", phase.packing, PACKINGS)
    if phase.optimizer_state not in OPTIMIZER_STATES:
        raise unknown_choice(f"{key}.optimizer_state", phase.optimizer_state, OPTIMIZER_STATES)
    phase.batch_growth.check(f"{key}.batch_growth")

"""Where a run's text comes from. What share of each is used when is said by the phases."""

from dataclasses import dataclass, field

from megatron_ext.legal import unknown_choice

PACKINGS = ("crossdoc", "document")


@dataclass(kw_only=True)
class SourceConfig:
    """One indexed corpus."""

    path: str
    """Prefix of a ``.bin``/``.idx`` pair, as written by tools.prepare."""

    domain: str = ""
    """Tag under which losses are reported; empty takes the source's own name."""

    max_epochs: float = 5.0
    """Times the whole source may be read before the plan is refused."""


@dataclass(kw_only=True)
class TokenizerConfig:
    """Which tokenizer the sources were indexed with."""

    path: str = ""
    """A SentencePiece ``.model``, tiktoken rank file or ``tokenizer.json``; empty when unknown."""

    kind: str = "sentencepiece"
    """``sentencepiece``, ``tiktoken`` or ``huggingface``."""


@dataclass(kw_only=True)
class DataConfig:
    """Sources to train on and to validate on."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Training corpora by name; the phases' mixtures use these names."""

    validation: dict[str, SourceConfig] = field(default_factory=dict)
    """Held-out corpora by name; each one's loss is reported on its own."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    index_cache: str = ""
    """Folder for shuffle and blend indices built ahead; empty builds them in memory."""

    synthetic: bool = False
    """Train on seeded random tokens and leave the sources unread: for dry runs and benchmarks."""

    def check(self) -> None:
        """Refuse a tokenizer kind that no table knows, and a limit that allows nothing.

        Raises:
            ValueError: naming the dotted key and what it may be.
        """
        kinds = ("sentencepiece", "tiktoken", "huggingface")
        if self.tokenizer.kind not in kinds:
            raise unknown_choice("data.tokenizer.kind", self.tokenizer.kind, kinds)
        for name, source in self.sources.items():
            if not source.max_epochs > 0:  # NaN limits nothing
                key = f"data.sources.{name}.max_epochs"
                raise ValueError(f"{key}={source.max_epochs:g} must be above 0.")

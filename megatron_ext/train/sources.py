"""The corpora that a run names, opened and held against what its phases want of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_ext.config import RunConfig
from megatron_ext.data.batches import PhaseBatches, collate, in_proportion
from megatron_ext.data.config import SourceConfig
from megatron_ext.data.held_out import HeldOut
from megatron_ext.data.indexed import IndexedCorpus
from megatron_ext.data.ledger import check_same_content
from megatron_ext.digest import sha256_of
from megatron_ext.train.phases import Phase, Plan
from megatron_ext.train.state import TrainState

if TYPE_CHECKING:
    import torch


class Samples(Protocol):
    """Micro-batches of a phase by sample number, and what they consumed."""

    def micro_batch(self, ks: Iterable[int]) -> "dict[str, torch.Tensor | None]": ...

    def ledger_at(self, k: int) -> dict[str, dict[str, Any]]: ...


class SyntheticBatches:
    """Seeded random tokens in place of text, for dry runs and benchmarks."""

    def __init__(self, run: RunConfig, phase: Phase):
        self.seed = (run.seed, phase.index)
        self.vocab_size, self.seq_length = run.model.vocab_size, phase.seq_length
        self.packing = phase.config.packing

    def micro_batch(self, ks: Iterable[int]) -> "dict[str, torch.Tensor | None]":
        """Sample k is drawn from (seed, phase, k)."""
        windows = np.stack([self._window(k) for k in ks])
        return collate(windows, [[] for _ in windows], packing=self.packing)

    def _window(self, k: int) -> np.ndarray:
        random = np.random.default_rng((*self.seed, k))
        return random.integers(0, self.vocab_size, self.seq_length + 1)

    def ledger_at(self, k: int) -> dict[str, dict[str, Any]]:
        """Nothing is consumed."""
        return {}


@dataclass(frozen=True)
class Corpora:
    """All text of a run, opened and checked."""

    training: dict[str, IndexedCorpus]
    validation: dict[str, HeldOut]


def open_corpora(run: RunConfig, plan: Plan) -> Corpora:
    """Raises as ``open_sources`` does."""
    return Corpora(training=open_sources(run, plan), validation=open_validation(run, plan))


def open_sources(run: RunConfig, plan: Plan) -> dict[str, IndexedCorpus]:
    """Every training corpus, checked.

    Raises:
        ValueError: a corpus is not given, missing, damaged, changed, of another tokenizer, or
            too small for the plan.
    """
    if run.data.synthetic:
        return {}
    if not run.data.sources:
        raise ValueError(
            "data.sources is empty: name a corpus (data.sources.NAME.path=PREFIX, written by "
            "tools.prepare), or set data.synthetic=true for a dry run."
        )
    opened = _open(run, run.data.sources, key="data.sources")
    _check_epochs(run, plan, opened)
    return opened


def open_validation(run: RunConfig, plan: Plan) -> dict[str, HeldOut]:
    """Every validation corpus, cut at the shortest sequence of the run so that losses compare."""
    length = min(phase.seq_length for phase in plan.phases)
    opened = _open(run, run.data.validation, key="data.validation")
    return {
        run.data.validation[name].domain or name: HeldOut(
            corpus, seq_length=length, tokens=run.evaluation.tokens_per_domain
        )
        for name, corpus in opened.items()
    }


def _open(
    run: RunConfig, wanted: Mapping[str, SourceConfig], *, key: str
) -> dict[str, IndexedCorpus]:
    tokenizer = run.data.tokenizer.path
    if tokenizer and not Path(tokenizer).is_file():
        raise ValueError(f"data.tokenizer.path={tokenizer}: there is no such file.")
    digest = sha256_of(Path(tokenizer)) if tokenizer else ""
    opened = {}
    for name, source in wanted.items():
        if not source.path:
            raise ValueError(
                f"{key}.{name}.path is not given: set {key}.{name}.path=PREFIX of a .bin/.idx "
                f"pair written by tools.prepare."
            )
        corpus = IndexedCorpus(source.path, key=f"{key}.{name}.path")
        corpus.check(tokenizer_sha256=digest)
        rows, ids = run.model.vocab_size, corpus.description.get("vocab_size")
        if isinstance(ids, int) and ids > rows:
            raise ValueError(
                f"model.vocab_size={rows} is less than the {ids} ids of the tokenizer that "
                f"{key}.{name}.path={source.path} was indexed with: set model.vocab_size={ids}, "
                f"or index the text with the model's own tokenizer."
            )
        opened[name] = corpus
    return opened


def _check_epochs(run: RunConfig, plan: Plan, sources: dict[str, IndexedCorpus]) -> None:
    """Refuse a plan that reads a source more often than it allows."""
    wanted = dict.fromkeys(sources, 0.0)
    for phase in plan.phases:
        for name, share in _shares(phase, sources).items():
            wanted[name] += share * phase.tokens
    for name, tokens in wanted.items():
        held, limit = sources[name].num_tokens, run.data.sources[name].max_epochs
        if tokens > held * limit:
            raise ValueError(
                f"the phases want {tokens:,.0f} tokens of data.sources.{name}, which holds "
                f"{held:,}: {tokens / held:.2f} epochs, and data.sources.{name}.max_epochs="
                f"{limit:g}. Lower its share, shorten the phases, add text, or raise max_epochs."
            )


def _shares(phase: Phase, sources: dict[str, IndexedCorpus]) -> dict[str, float]:
    """Token-average share of each source over a phase: a power ramp spends 1/(p+1) at its end."""
    start = phase.config.mixture or in_proportion(sources)
    end = phase.config.mixture_end or start
    weight = 1 / (phase.config.ramp_power + 1)
    return {
        name: (1 - weight) * start.get(name, 0.0) + weight * end.get(name, 0.0)
        for name in {*start, *end}
    }


def describe_tokenizer(run: RunConfig) -> dict[str, Any]:
    """What a checkpoint says of the tokenizer; nothing where none is named."""
    path = run.data.tokenizer.path
    return {"tokenizer_sha256": sha256_of(Path(path))} if path else {}


def open_phase(
    run: RunConfig, phase: Phase, sources: dict[str, IndexedCorpus], state: TrainState
) -> Samples:
    """The samples of ``phase`` from the state's anchor on.

    Raises:
        ValueError: a source holds other text than what the state has consumed of it.
    """
    if run.data.synthetic:
        return SyntheticBatches(run, phase)
    check_same_content(state.consumed, sources)
    return PhaseBatches(
        replace(phase.config, seq_length=phase.seq_length, tokens=phase.tokens),
        sources,
        state.ledger,
        seed=run.seed,
        cache=run.data.index_cache,
        skipped=[(s["first"], s["past"]) for s in state.skipped if s["phase"] == phase.index],
        begun=state.anchor_tokens,
    )

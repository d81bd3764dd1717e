"""Whether two implementations of one model agree: logits, and layer by layer where they part."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.convert.families import FAMILIES
from megatron_ext.convert.hf_config import read_config, write_config
from megatron_ext.convert.huggingface import open_folder
from megatron_ext.convert.moves import match
from megatron_ext.evaluate import alone

TOLERANCE = 1e-4
"""Largest allowed error of a token's vector over that vector's length (both in fp32)."""


@dataclass
class Activations:
    """What a model computed for some ids: the residual stream after each layer, then logits."""

    layers: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class Parity:
    """How two models compare on some text."""

    name: str
    tokens: int
    largest_difference: float
    """Of logits, absolute."""

    layers: dict[str, float]
    """Error of each layer's output over its length, at the worst token."""

    first_departing: str | None
    """The first place whose difference exceeds the tolerance."""

    same_next_token: float
    """Share of positions with the same most likely next token."""

    loss: float
    reference_loss: float

    @property
    def agrees(self) -> bool:
        """Whether nothing departs."""
        return self.first_departing is None

    def as_text(self) -> str:
        """One line, or as many as it takes to say where they part."""
        verdict = "agree" if self.agrees else f"DEPART, first at {self.first_departing}"
        lines = [
            f"  {self.name} ({self.tokens} tokens): {verdict}; largest logit difference "
            f"{self.largest_difference:.2e}, same next token {self.same_next_token:.2%}, loss "
            f"{self.loss:.6f} against {self.reference_loss:.6f}"
        ]
        if not self.agrees:
            lines += [f"    {name}: {size:.2e}" for name, size in self.layers.items()]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self) | {"agrees": self.agrees}


def verify(huggingface: Path, checkpoint: Path, texts: dict[str, Tensor]) -> list[Parity]:
    """Compare a checkpoint with a Hugging Face folder in fp32, one model in memory at a time.

    Args:
        huggingface: the reference folder.
        checkpoint: of any layout.
        texts: token ids [1, S] by name.
    """
    reference = reference_model(huggingface)
    expected = {name: _run_reference(reference, ids) for name, ids in texts.items()}
    del reference
    with alone.loaded(checkpoint) as model:
        return [compare(n, expected[n], _run_ours(model, ids), ids) for n, ids in texts.items()]


def reference_model(folder: Path) -> Any:
    """The transformers model of a folder in fp32; of releases with remote code, our own reading."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    import megatron_ext.convert.hf_index  # noqa: F401, makes Index known to transformers

    logging.disable_progress_bar()
    config = json.loads((folder / "config.json").read_text())
    known = {family.architectures[-1] for family in FAMILIES.values()}
    if set(config.get("architectures") or []) & known:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval()
    shape = read_config(config)
    found, _ = match(open_folder(folder).tensors, shape)
    own = write_config(shape, dtype="float32", tokens={})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(own.pop("model_type"), **own))
    state = {name: stored.read().float() for name, stored in found.items()}
    model.load_state_dict(state, strict=shape.untie_embeddings_and_output_weights)
    return model.float().eval()


def _run_reference(model: Any, ids: Tensor) -> Activations:
    kept = Activations()
    modules = {"embedding": model.model.embed_tokens}
    modules |= {f"layer {i}": layer for i, layer in enumerate(model.model.layers)}
    with _recording(modules, kept, batch_first=True), torch.no_grad():
        kept.logits = model(ids, use_cache=False).logits.float()
    return kept


def _run_ours(model: Any, ids: Tensor) -> Activations:
    kept = Activations()
    modules = {"embedding": model.embedding}
    modules |= {f"layer {i}": layer for i, layer in enumerate(model.decoder.layers)}
    with _recording(modules, kept, batch_first=False):
        kept.logits = alone.logits(model, ids).float()
    return kept


@contextmanager
def _recording(modules: dict[str, Any], kept: Activations, *, batch_first: bool) -> Iterator[None]:
    """Keep every module's output as [B, S, H]."""

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            kept.layers[name] = hidden if batch_first else hidden.transpose(0, 1)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compare(name: str, expected: Activations, got: Activations, ids: Tensor) -> Parity:
    """Every layer's difference in the order of computation, logits last."""
    places = expected.layers | {"logits": expected.logits}
    found = got.layers | {"logits": got.logits}
    sizes = {place: _difference(found[place], places[place]) for place in places}
    departing = [place for place, size in sizes.items() if not size <= TOLERANCE]
    same = got.logits.argmax(-1) == expected.logits.argmax(-1)
    return Parity(
        name=name,
        tokens=ids.numel(),
        largest_difference=float((got.logits - expected.logits).abs().max()),
        layers=sizes,
        first_departing=departing[0] if departing else None,
        same_next_token=float(same.float().mean()),
        loss=alone.mean_loss(got.logits, ids),
        reference_loss=alone.mean_loss(expected.logits, ids),
    )


def _difference(got: Tensor, expected: Tensor) -> float:
    """The worst token's error over its length: single channels may be thousands of times larger."""
    if got.shape != expected.shape:
        return float("inf")
    lengths = expected.norm(dim=-1).clamp_min(1e-12)
    return float(((got - expected).norm(dim=-1) / lengths).max())

"""Every published architecture: its Hugging Face class names, its table, its config keys."""

from dataclasses import dataclass, field
from typing import Any

from megatron_ext.convert.llama import IGNORED, LLAMA
from megatron_ext.convert.rules import Ignore, Rule
from megatron_ext.convert.stablelm import STABLELM
from megatron_ext.legal import unknown_choice
from megatron_ext.models.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """What a conversion must know of one family, all of it data."""

    name: str
    """``model.family`` of the checkpoint."""

    architectures: tuple[str, ...]
    """Class names read, oldest first; the last one is written."""

    model_type: str
    rules: tuple[Rule, ...]
    normalization: str = "RMSNorm"
    norm_epsilon: tuple[str, ...] = ("rms_norm_eps",)
    """Config keys of the norms' epsilon; the first is written."""

    rotary_share: tuple[str, ...] = ()
    """Config keys of the rotated share of a head; none when all of it rotates."""

    defaults: dict[str, Any] = field(default_factory=dict)
    """What the Hugging Face class takes for a key that config.json leaves out."""

    norm_head: bool = False
    constants: dict[str, Any] = field(default_factory=dict)
    """Keys that must have this value where present, and are written with it."""

    ignored: tuple[Ignore, ...] = IGNORED


_COMMON = {"rope_theta": 10000.0, "initializer_range": 0.02, "tie_word_embeddings": False}
_LLAMA_DEFAULTS = _COMMON | {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
_NO_BIAS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="llama",
            architectures=("YiForCausalLM", "LlamaForCausalLM"),
            model_type="llama",
            rules=LLAMA,
            defaults=_LLAMA_DEFAULTS,
            constants=_NO_BIAS,
        ),
        Family(
            name="index",
            architectures=("IndexForCausalLM",),
            model_type="index",
            rules=LLAMA,
            norm_head=True,
            defaults=_COMMON
            | {"rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "rope_ratio": 1.0},
            constants=_NO_BIAS,
        ),
        Family(
            name="skywork",
            architectures=("SkyworkForCausalLM", "LlamaForCausalLM"),
            model_type="llama",
            rules=LLAMA,
            defaults=_LLAMA_DEFAULTS | {"max_position_embeddings": 4096},
            constants=_NO_BIAS,
        ),
        Family(
            name="stablelm",
            architectures=("StableLMEpochForCausalLM", "StableLmForCausalLM"),
            model_type="stablelm",
            rules=STABLELM,
            normalization="LayerNorm",
            norm_epsilon=("layer_norm_eps", "norm_eps"),
            rotary_share=("partial_rotary_factor", "rope_pct"),
            defaults=_COMMON
            | {"layer_norm_eps": 1e-5, "max_position_embeddings": 4096}
            | {"partial_rotary_factor": 0.25, "use_qkv_bias": False},
            constants={
                "hidden_act": "silu",
                "qk_layernorm": False,
                "use_parallel_residual": False,
            },
        ),
    )
}


def family_of(config: dict[str, Any]) -> Family:
    """The family whose class a config.json names.

    Raises:
        ValueError: no table of ours reads that class.
    """
    named = config.get("architectures") or []
    for family in FAMILIES.values():
        if set(named) & set(family.architectures):
            return family
    known = {name for family in FAMILIES.values() for name in family.architectures}
    raise unknown_choice("config.json: architectures", ", ".join(named) or "(absent)", known)


def rules_of(model: ModelConfig) -> list[Rule]:
    """The table of a shape: its family's, without the head when that is the embedding.

    Raises:
        ValueError: the shape contradicts its family.
    """
    family = FAMILIES[model.family]
    wants_bias = model.family == "stablelm"
    for key, has in (("normalization", family.normalization), ("add_qkv_bias", wants_bias)):
        if getattr(model, key) != has:
            raise ValueError(
                f"model.{key}={getattr(model, key)} does not fit model.family={model.family}, "
                f"whose Hugging Face class has {has}: set model.{key}={has}, or another family."
            )
    if model.norm_head and not family.norm_head:
        raise ValueError(
            f"model.norm_head=true does not fit model.family={model.family}, whose Hugging Face "
            f"class has a plain head: set model.family=index, or fold it with --fold-norm-head."
        )
    rules = list(family.rules)
    if not model.untie_embeddings_and_output_weights:
        rules = [rule for rule in rules if rule.megatron != "output_layer.weight"]
    return rules


def tensor_count(model: ModelConfig) -> int:
    """Hugging Face tensors of a shape."""
    return sum(
        len(rule.parts(model)) * (model.num_layers if "{i}" in rule.megatron else 1)
        for rule in rules_of(model)
    )


def parameter_count(model: ModelConfig) -> int:
    """Numbers in those tensors."""
    total = 0
    for rule in rules_of(model):
        shape = rule.shape(model)
        numbers = shape[0] * (shape[1] if len(shape) == 2 else 1)
        total += numbers * (model.num_layers if "{i}" in rule.megatron else 1)
    return total

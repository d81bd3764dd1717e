"""config.json to ModelConfig and back: every key that changes what the weights compute."""

import math
from typing import Any

from megatron_ext.convert.families import FAMILIES, Family, family_of
from megatron_ext.models.config import ModelConfig

RECORD = "megatron_ext"
"""Key of config.json under which an export says what a reader of weights cannot see."""


def read_config(config: dict[str, Any]) -> ModelConfig:
    """The shape that a config.json describes.

    Raises:
        ValueError: an unknown class, or a setting that no model here computes.
    """
    family = family_of(config)
    folded = bool(config.get(RECORD, {}).get("norm_head_folded"))
    _refuse_unknown(config, family)
    heads, hidden = _need(config, "num_attention_heads"), _need(config, "hidden_size")
    epsilon = _first(config, family.norm_epsilon, family)
    return ModelConfig(
        family="index" if folded else family.name,
        num_layers=_need(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_need(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=None if config.get("head_dim") == hidden / heads else config.get("head_dim"),
        vocab_size=_need(config, "vocab_size"),
        max_position_embeddings=_default(config, "max_position_embeddings", family),
        normalization=family.normalization,
        layernorm_epsilon=float(epsilon),
        rotary_base=_rotary_base(config, family),
        rotary_percent=_rotary_share(config, family),
        add_qkv_bias=bool(_default(config, "use_qkv_bias", family, absent=False)),
        untie_embeddings_and_output_weights=not _default(config, "tie_word_embeddings", family),
        norm_head=folded or (family.norm_head and bool(config.get("norm_head", 0))),
        init_method_std=float(_default(config, "initializer_range", family)),
    )


def write_config(
    model: ModelConfig, *, dtype: str, tokens: dict[str, Any], folded: bool = False
) -> dict[str, Any]:
    """The config.json of a shape; ``tokens`` holds bos, eos and pad ids.

    RoPE keys are written in both styles transformers has used: ``rope_theta`` beside the head
    (until 4.x) and ``rope_parameters`` (from 5.0). A reader of either finds the base.
    """
    family = FAMILIES["llama" if folded else model.family]
    theta = model.rotary_base
    config: dict[str, Any] = {
        "architectures": [family.architectures[-1]],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups(),
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        family.norm_epsilon[0]: model.layernorm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    config |= family.constants | tokens
    if model.family != "stablelm":
        config["head_dim"] = model.head_dim()
    if family.norm_head:
        # The released class multiplies 10000 by rope_ratio; the base keys keep what it multiplies.
        config |= {"norm_head": int(model.norm_head), "rope_ratio": theta / 10000.0}
        theta = 10000.0
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if family.rotary_share:
        config["partial_rotary_factor"] = model.rotary_percent
        rope["partial_rotary_factor"] = model.rotary_percent
        config["use_qkv_bias"] = model.add_qkv_bias
    config |= {"rope_theta": theta, "rope_parameters": rope}
    if folded:
        config[RECORD] = {"norm_head_folded": True}
    return config


def _refuse_unknown(config: dict[str, Any], family: Family) -> None:
    for key, value in family.constants.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"config.json: {key}={config[key]} is not computed by any model here "
                f"({family.name} has {key}={value}): convert a release without it."
            )
    if config.get("quantization_config"):
        raise ValueError(
            "config.json: quantization_config is set, and quantised weights cannot be trained: "
            "convert the unquantised release."
        )
    for key in ("rope_scaling", "rope_parameters"):
        kind = (config.get(key) or {}).get("rope_type", (config.get(key) or {}).get("type"))
        if kind not in (None, "default"):
            raise ValueError(
                f"config.json: {key} asks for RoPE scaling '{kind}', which no model here computes: "
                f"convert a release that only sets rope_theta."
            )


def _rotary_base(config: dict[str, Any], family: Family) -> float:
    old = config.get("rope_theta")
    new = (config.get("rope_parameters") or {}).get("rope_theta")
    if old is not None and new is not None and not math.isclose(old, new):
        raise ValueError(
            f"config.json: rope_theta={old} and rope_parameters.rope_theta={new} disagree: "
            f"remove the wrong one."
        )
    base = float(new if new is not None else old if old is not None else 0)
    base = base or float(family.defaults["rope_theta"])
    return base * float(_default(config, "rope_ratio", family, absent=1.0))


def _rotary_share(config: dict[str, Any], family: Family) -> float:
    if not family.rotary_share:
        return 1.0
    nested = (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    return float(nested if nested is not None else _first(config, family.rotary_share, family))


def _need(config: dict[str, Any], key: str) -> int:
    if key not in config:
        raise ValueError(f"config.json: {key} is absent, and the shape cannot be known without it.")
    return int(config[key])


def _default(config: dict[str, Any], key: str, family: Family, absent: Any = None) -> Any:
    value = config.get(key)
    return family.defaults.get(key, absent) if value is None else value


def _first(config: dict[str, Any], keys: tuple[str, ...], family: Family) -> Any:
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    return family.defaults[keys[0]]

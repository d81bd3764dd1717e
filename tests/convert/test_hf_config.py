"""config.json: old keys, both RoPE styles, and what is refused."""

import pytest

from megatron_ext.convert.hf_config import read_config, write_config
from tests.convert.test_rules import SHAPES

YI = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 300,
}
STABLELM = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "use_qkv_bias": True,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_survives_config_json(name):
    again = read_config(write_config(SHAPES[name], dtype="bfloat16", tokens={}))
    for key in ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "rotary_base"):
        assert getattr(again, key) == getattr(SHAPES[name], key)
    assert again.query_groups() == SHAPES[name].query_groups()
    assert again.head_dim() == SHAPES[name].head_dim()
    assert again.norm_head == SHAPES[name].norm_head


@pytest.mark.parametrize(
    "rope, base",
    [
        ({}, 10000.0),
        ({"rope_theta": 5e6}, 5e6),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 320000.0}}, 320000.0),
        ({"rope_theta": 1e7, "rope_parameters": {"rope_theta": 1e7}}, 1e7),
    ],
)
def test_the_rope_base_is_read_in_both_styles(rope, base):
    assert read_config(YI | rope).rotary_base == base


def test_two_rope_bases_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"rope_theta=10000\.0 and rope_parameters"):
        read_config(YI | {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 5e6}})


def test_an_export_writes_the_rope_base_in_both_styles():
    model = read_config(YI | {"rope_theta": 5e6})
    config = write_config(model, dtype="bfloat16", tokens={"eos_token_id": 7})
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e6
    assert config["eos_token_id"] == 7


def test_the_first_stablelm_keys_mean_the_same_as_the_later_ones():
    old = {"architectures": ["StableLMEpochForCausalLM"], "norm_eps": 1e-6, "rope_pct": 0.5}
    new = {
        "architectures": ["StableLmForCausalLM"],
        "layer_norm_eps": 1e-6,
        "partial_rotary_factor": 0.5,
    }
    assert read_config(STABLELM | old) == read_config(STABLELM | new)
    assert read_config(STABLELM | old).rotary_percent == 0.5


def test_index_keeps_its_ratio_and_its_head():
    config = YI | {"architectures": ["IndexForCausalLM"], "norm_head": 1, "rope_ratio": 32}
    model = read_config(config)
    assert model.norm_head and model.rotary_base == 320000.0
    written = write_config(model, dtype="bfloat16", tokens={})
    assert (written["norm_head"], written["rope_ratio"], written["rope_theta"]) == (1, 32.0, 1e4)


def test_a_folded_export_is_a_plain_llama_that_says_so():
    config = YI | {"architectures": ["IndexForCausalLM"], "norm_head": 1, "rope_ratio": 32}
    written = write_config(read_config(config), dtype="bfloat16", tokens={}, folded=True)
    assert written["architectures"] == ["LlamaForCausalLM"] and "norm_head" not in written
    assert written["rope_theta"] == 320000.0
    assert read_config(written).norm_head


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM is not known: choose one"),
        ({"architectures": None}, "absent"),
        ({"attention_bias": True}, "attention_bias=True is not computed"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "RoPE scaling 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "RoPE scaling 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_what_no_model_here_computes_is_refused_by_name(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_config(YI | change)

"""The tables: right rows, right names, right totals."""

import pytest
import torch

from megatron_ext.convert.families import parameter_count, tensor_count
from megatron_ext.convert.moves import moves, source_shapes
from megatron_ext.convert.rules import FuseQKV
from megatron_ext.models.config import ModelConfig

SHAPES = {
    "index-1.9b": ModelConfig(
        family="index",
        num_layers=36,
        hidden_size=2048,
        ffn_hidden_size=5888,
        num_attention_heads=16,
        vocab_size=65029,
        norm_head=True,
    ),
    "stablelm-2-1.6b": ModelConfig(
        family="stablelm",
        num_layers=24,
        hidden_size=2048,
        ffn_hidden_size=5632,
        num_attention_heads=32,
        vocab_size=100352,
        normalization="LayerNorm",
        add_qkv_bias=True,
        rotary_percent=0.25,
    ),
    "skywork-13b": ModelConfig(
        family="skywork",
        num_layers=52,
        hidden_size=4608,
        ffn_hidden_size=12288,
        num_attention_heads=36,
        vocab_size=65519,
    ),
    "yi-6b": ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=4,
        vocab_size=64000,
    ),
    "yi-9b": ModelConfig(
        num_layers=48,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=4,
        vocab_size=64000,
    ),
    "yi-34b": ModelConfig(
        num_layers=60,
        hidden_size=7168,
        ffn_hidden_size=20480,
        num_attention_heads=56,
        num_query_groups=8,
        vocab_size=64000,
    ),
}
PUBLISHED = {  # tensors and parameters
    "index-1.9b": (327, 2_172_819_456),
    "stablelm-2-1.6b": (340, 1_644_515_328),
    "skywork-13b": (471, 13_854_113_280),
    "yi-6b": (291, 6_061_035_520),
    "yi-9b": (435, 8_829_407_232),
    "yi-34b": (543, 34_388_917_248),
}


@pytest.mark.parametrize("name", SHAPES)
def test_full_size_totals_are_the_published_ones(name):
    assert (tensor_count(SHAPES[name]), parameter_count(SHAPES[name])) == PUBLISHED[name]


@pytest.mark.parametrize("name", SHAPES)
def test_full_size_names_and_shapes_are_those_of_the_transformers_class(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    import megatron_ext.convert.hf_index  # noqa: F401, makes Index known to transformers
    from megatron_ext.convert.hf_config import write_config

    config = write_config(SHAPES[name], dtype="bfloat16", tokens={})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config)
        )
    theirs = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert source_shapes(SHAPES[name]) == theirs


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_has_a_name_of_its_own_for_every_exported_tensor(name):
    gguf = pytest.importorskip("gguf")
    model = SHAPES[name]  # Index goes there folded, as a plain Llama
    kind = gguf.MODEL_ARCH.STABLELM if model.family == "stablelm" else gguf.MODEL_ARCH.LLAMA
    known = gguf.get_tensor_name_map(kind, model.num_layers)
    names = {known.get_name(key, try_suffixes=(".weight", ".bias")) for key in source_shapes(model)}
    assert None not in names and len(names) == tensor_count(model)


@pytest.mark.parametrize("heads, groups", [(8, 8), (8, 2), (14, 2), (6, 1)])
def test_qkv_rows_stand_group_by_group(heads, groups):
    head = 4
    model = ModelConfig(
        num_layers=1,
        hidden_size=heads * head,
        ffn_hidden_size=8,
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=9,
    )
    q = torch.randn(heads * head, 3)
    k, v = torch.randn(2, groups * head, 3)
    expected = []
    for group in range(groups):  # written out, without reshapes
        for number in range(group * heads // groups, (group + 1) * heads // groups):
            expected.append(q[number * head : (number + 1) * head])
        expected.append(k[group * head : (group + 1) * head])
        expected.append(v[group * head : (group + 1) * head])
    fused = torch.full((heads * head + 2 * groups * head, 3), torch.nan)
    parts = {"q": q, "k": k, "v": v}
    for piece in FuseQKV("{p}", "fused", "hidden").pieces(model):
        rows = parts[piece.name][piece.source_row : piece.source_row + piece.rows]
        fused[piece.row : piece.row + piece.rows] = rows
    assert torch.equal(fused, torch.cat(expected))


@pytest.mark.parametrize("name", SHAPES)
def test_every_row_of_every_tensor_is_moved_exactly_once(name):
    model = SHAPES[name]
    rows_left = {key: shape[0] for key, shape in source_shapes(model).items()}
    for move in moves(model):
        assert [piece.row for piece in move.pieces] == _starts(move.pieces)
        assert move.pieces[-1].row + move.pieces[-1].rows == move.shape[0]
        for piece in move.pieces:
            rows_left[piece.name] -= piece.rows
    assert not any(rows_left.values())


def _starts(pieces):
    starts = [0]
    for piece in pieces[:-1]:
        starts.append(starts[-1] + piece.rows)
    return starts

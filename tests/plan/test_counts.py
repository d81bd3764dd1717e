"""Parameters and FLOPs against the overview table of the published systems."""

import pytest

from megatron_ext.models.config import ModelConfig
from megatron_ext.plan.flops import flops_per_token
from megatron_ext.plan.parameters import count_parameters


def shape(layers, hidden, ffn, heads, groups, vocab, **more):
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=vocab,
        **more,
    )


NORMS = {"normalization": "LayerNorm", "add_qkv_bias": True}
SYSTEMS = [
    ("index", shape(36, 2048, 5888, 16, 16, 65029), 2172819456, 1906311168, 15.861, 14.049),
    ("slm2", shape(24, 2048, 5632, 32, 32, 100352, **NORMS), 1644515328, 1233125376, 11.048, 9.84),
    ("skywork", shape(52, 4608, 12288, 36, 36, 65519), 13854113280, 13249806336, 93.088, 87.199),
    ("yi6", shape(32, 4096, 11008, 32, 4, 64000), 6061035520, 5536481280, 41.234, 38.013),
    ("yi9", shape(48, 4096, 11008, 32, 4, 64000), 8829407232, 8304721920, 61.065, 56.233),
    ("yi34", shape(60, 7168, 20480, 56, 8, 64000), 34388917248, 33470545920, 224.72, 214.15),
]  # fmt: skip


@pytest.mark.parametrize(("name", "model", "total", "matmul", "full", "causal"), SYSTEMS)
def test_counts_equal_the_published_table(name, model, total, matmul, full, causal):
    count = count_parameters(model)
    assert (count.total, count.non_embedding_matmul) == (total, matmul)
    assert flops_per_token(model, 4096) / 1e9 == pytest.approx(full, abs=0.006)
    causal_flops = flops_per_token(model, 4096, convention="causal")
    assert causal_flops / 1e9 == pytest.approx(causal, abs=0.006)


def test_an_unknown_convention_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="full"):
        flops_per_token(SYSTEMS[0][1], 4096, convention="half")

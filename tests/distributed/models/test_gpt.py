"""What the builder makes of a configuration: shapes, initial weights, checkpoints, packing."""

import math

import pytest
import torch

from megatron_ext.testing import run_on_ranks
from tests.distributed.models.small_models import (
    PP,
    TP,
    VPP,
    V,
    build,
    gather_rows,
    positions,
    small,
)

SHAPES = {
    "index": {"norm_head": True, "num_query_groups": 4, "scaled_output_init": False},
    "yi": {"num_attention_heads": 14, "num_query_groups": 2, "kv_channels": 8},
    "stablelm": {
        "normalization": "LayerNorm",
        "add_qkv_bias": True,
        "rotary_percent": 0.25,
        "num_query_groups": 4,
    },
    "tied": {"untie_embeddings_and_output_weights": False},
}


def _tokens(length, seed=0):
    return torch.randint(0, V, (1, length), generator=torch.Generator().manual_seed(seed))


def _trains_and_is_checkpointed_whole(shape, parallel):
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    _, chunks = build(small(model=SHAPES[shape], **parallel), wrap_ddp=False)
    metadata = ensure_metadata_has_dp_cp_group(None)
    for chunk in chunks:
        saved = chunk.sharded_state_dict(metadata=metadata)
        assert {name for name, _ in chunk.named_parameters()} <= set(saved)
    if parallel == PP:
        return
    (chunk,) = chunks
    tokens = _tokens(9)
    loss = chunk(tokens, positions(tokens), None, labels=tokens)
    assert loss.shape == (1, 9)
    loss.mean().backward()
    missing = [n for n, p in chunk.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    if shape in ("yi", "stablelm"):
        assert abs(float(loss.detach().mean()) - math.log(V)) < 0.2


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize(("parallel", "ranks"), [({}, 1), (TP, 2), (PP, 2)], ids=["1", "tp", "pp"])
def test_every_shape_trains_and_every_parameter_is_checkpointed(shape, parallel, ranks):
    run_on_ranks(_trains_and_is_checkpointed_whole, shape, parallel, world_size=ranks)


def _packed_is_alone(shape, parallel):
    from megatron_ext.train.step import packed_seq_params

    _groups, (chunk,) = build(small(model=SHAPES[shape], **parallel), wrap_ddp=False)
    documents = [_tokens(length, seed=length) for length in (5, 1, 8, 2)]
    tokens = torch.cat(documents, dim=1)
    ends = torch.tensor([0, 5, 6, 14, 16], dtype=torch.int32)
    with torch.no_grad():
        packed = chunk(tokens, positions(tokens), None, packed_seq_params=packed_seq_params(ends))
        alone = [chunk(d, positions(d), None) for d in documents]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-6)
    whole = chunk(tokens, positions(tokens), None).detach()
    assert not torch.allclose(packed[:, 5:], whole[:, 5:], atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("shape", ["index", "yi", "stablelm"])
@pytest.mark.parametrize(("parallel", "ranks"), [({}, 1), (TP, 2)], ids=["1", "tp"])
def test_packed_documents_have_the_logits_of_documents_alone(shape, parallel, ranks):
    run_on_ranks(_packed_is_alone, shape, parallel, world_size=ranks)


def _one_document_pack_counts_positions_from_zero():
    from megatron_ext.train.step import packed_seq_params

    _, (chunk,) = build(small(), wrap_ddp=False)
    tokens = _tokens(12)
    ends = torch.tensor([0, 12], dtype=torch.int32)
    with torch.no_grad():
        packed = chunk(tokens, positions(tokens), None, packed_seq_params=packed_seq_params(ends))
        torch.testing.assert_close(packed, chunk(tokens, positions(tokens), None))


def test_a_pack_of_one_document_is_that_document():
    run_on_ranks(_one_document_pack_counts_positions_from_zero, world_size=1)


def _initial_weights(folder, parallel):
    from megatron_ext.models.init import canonical_parameters

    groups, chunks = build(small(model=SHAPES["tied"], **parallel), wrap_ddp=False)
    found = {}
    for chunk in chunks:
        for name, parameter in canonical_parameters(chunk):
            found[name] = parameter.detach()
    if groups.tp.size() > 1:
        words = found["embedding.word_embeddings.weight"]
        found = {"embedding.word_embeddings.weight": gather_rows(words, groups.tp)}
    torch.save(found, folder / f"{torch.distributed.get_rank()}")


def test_initial_weights_are_the_same_in_every_layout(tmp_path):
    run_on_ranks(_initial_weights, tmp_path, {}, world_size=1)
    want = torch.load(tmp_path / "0")
    want["output_layer.weight"] = want["embedding.word_embeddings.weight"]
    for parallel in (TP, PP, VPP):
        run_on_ranks(_initial_weights, tmp_path, parallel, world_size=2)
        for rank in range(2):
            for name, value in torch.load(tmp_path / f"{rank}").items():
                assert torch.equal(value[:V], want[name][:V]), (parallel, name)


def _deviations():
    run = small(model=SHAPES["index"] | {"hidden_size": 128, "init_method_std": 0.01})
    _, (flat,) = build(run, wrap_ddp=False)
    for name, parameter in flat.named_parameters():
        if parameter.dim() == 2:
            assert abs(float(parameter.detach().std()) / 0.01 - 1) < 0.05, name
    run.model.scaled_output_init = True
    from megatron_ext.models.gpt import build_model

    (scaled,) = build_model(run, flat.pg_collection, wrap_ddp=False)
    layer = scaled.decoder.layers[0]
    want = 0.01 / math.sqrt(2 * run.model.num_layers)
    for weight in (layer.self_attention.linear_proj.weight, layer.mlp.linear_fc2.weight):
        assert abs(float(weight.detach().std()) / want - 1) < 0.05


def test_initial_deviation_follows_the_config_with_and_without_scaled_outputs():
    run_on_ranks(_deviations, world_size=1)


def _rotary_base():
    from megatron_ext.models.gpt import build_model
    from megatron_ext.models.rope import set_rotary_base

    run = small()
    groups, (chunk,) = build(run, wrap_ddp=False)
    tokens = _tokens(20)
    with torch.no_grad():
        before = chunk(tokens, positions(tokens), None)
        set_rotary_base([chunk], 320000.0)
        after = chunk(tokens, positions(tokens), None)
        run.model.rotary_base = 320000.0
        (fresh,) = build_model(run, groups, wrap_ddp=False)
        torch.testing.assert_close(fresh(tokens, positions(tokens), None), after)
    assert not torch.allclose(before[..., :V], after[..., :V])


def test_the_rotary_base_can_change_between_two_forwards():
    run_on_ranks(_rotary_base, world_size=1)


def _stretched():
    from megatron_ext.models import rope

    run = small(model={"rotary_percent": 0.5})
    _, (chunk,) = build(run, wrap_ddp=False)
    tokens, dim = _tokens(20), rope.rotated_channels(chunk)
    assert dim == 8
    with torch.no_grad():
        plain = chunk(tokens, positions(tokens), None)
        rope.set_frequencies([chunk], rope.linear(10000.0, dim, factor=4))
        ours = chunk(tokens, positions(tokens), None)
        rope.set_rotary_base([chunk], 10000.0)
        chunk.rotary_pos_emb.seq_len_interpolation_factor = 4
        type(chunk.rotary_pos_emb).forward.cache_clear()
        torch.testing.assert_close(ours, chunk(tokens, positions(tokens), None))
    assert not torch.allclose(plain[..., :V], ours[..., :V])


def test_linear_scaling_is_megatrons_interpolation_of_positions():
    run_on_ranks(_stretched, world_size=1)


def _meta():
    with torch.device("meta"):
        _, (chunk,) = build(small(model=SHAPES["index"]), wrap_ddp=False, meta=True)
    assert all(parameter.is_meta for parameter in chunk.parameters())


def test_a_dry_run_builds_shapes_without_values():
    run_on_ranks(_meta, world_size=1)

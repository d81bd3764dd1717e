"""Transformer Engine's layers hold the parameters of the local ones, under the same keys.

Shown on a CPU with the real Python layers over a stand-in for the compiled part: names, shapes,
tensor-parallel cuts and checkpoints. Nothing here shows a kernel, an FP8 number or a speed.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ext.config import RunConfig
from megatron_ext.devices.config import KernelsConfig, PrecisionConfig
from megatron_ext.models.config import ModelConfig
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.testing import env, meeting, run_on_ranks
from megatron_ext.train.config import PhaseConfig

CONF = Path(__file__).parents[2] / "conf" / "model"
MODELS = sorted(path.stem for path in CONF.glob("*.yaml"))
STATE = {"step": 1, "tokens": 0, "phase": 0}


def fields(name: str) -> dict[str, Any]:
    """A model file with the files it builds on."""
    own = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    below = [fields(base) for base in own.pop("defaults", []) if base != "_self_"]
    return {key: value for part in [*below, own] for key, value in part.items()}


def narrow(name: str) -> ModelConfig:
    """A published shape at two layers and heads of 8 channels; everything else as it is."""
    model = ModelConfig(**fields(name))
    return replace(
        model,
        num_layers=2,
        kv_channels=8,
        hidden_size=8 * model.num_attention_heads,
        ffn_hidden_size=48,
        vocab_size=509,
    )


def run(name: str, *, tp: int = 1, impl: str = "auto", dtype: str = "bf16") -> RunConfig:
    return RunConfig(
        name="layout",
        model=narrow(name),
        phases=[PhaseConfig(tokens=1)],
        parallel=ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=tp > 1),
        precision=PrecisionConfig(dtype=dtype),
        kernels=KernelsConfig(transformer_impl=impl),
    )


def build(config: RunConfig, groups: Any) -> list[Any]:
    """Chunks of one rank; the real layers refuse to be built where torch sees no GPU."""
    from megatron_ext.models.gpt import build_model
    from tests.te.fake_extension import pretending

    with pretending():
        return build_model(config, groups, wrap_ddp=False)


def start(config: RunConfig) -> Any:
    from megatron_ext.parallel import groups

    return groups.start(config.parallel, env(), seed=1, init_method=meeting())


def on_ranks(test: Any, name: str, tp: int) -> None:
    """Run ``test(name, tp)`` on ``tp`` ranks, unless the model does not divide so."""
    try:
        narrow(name).check(ParallelConfig(tensor_model_parallel_size=tp))
    except ValueError as refusal:
        pytest.skip(str(refusal))
    run_on_ranks(test, name, tp, world_size=tp)


def stored_name(name: str) -> str:
    """A local parameter's name as the fused layers call it."""
    from megatron_ext.models.local_spec import CHECKPOINT_KEYS

    for local, fused in CHECKPOINT_KEYS.items():
        name = name.replace(f".{local}", f".{fused}")
    return name


def parameters(chunks: list[Any]) -> Iterator[tuple[str, Any]]:
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield stored_name(name), parameter


def sharded_keys(chunks: list[Any]) -> dict[str, tuple[int, ...]]:
    """Checkpoint key and global shape of everything but _extra_state."""
    from megatron_ext.checkpoint.state import model_parts

    return {part.key: part.shape for _, parts in model_parts(chunks) for part in parts}


def _same_layout(name: str, tp: int) -> None:
    groups = start(run(name, tp=tp))
    engine, local = build(run(name, tp=tp), groups), build(run(name, tp=tp, impl="local"), groups)
    kinds = {type(m).__name__ for m in engine[0].modules()}
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= kinds
    assert "TEDotProductAttention" in kinds and "SDPACoreAttention" not in kinds
    assert {n: p.shape for n, p in parameters(engine)} == {n: p.shape for n, p in parameters(local)}
    assert sharded_keys(engine) == sharded_keys(local)


def _same_initial_weights(name: str, tp: int) -> None:
    """Weights are drawn by name: the two specs start from the same values."""
    groups = start(run(name, tp=tp))
    engine = dict(parameters(build(run(name, tp=tp), groups)))
    for key, parameter in parameters(build(run(name, tp=tp, impl="local"), groups)):
        assert parameter.equal(engine[key]), key


def _ideas(name: str, tp: int) -> None:
    config = run(name, tp=tp)
    groups = start(config)
    engine, local = build(config, groups)[0], build(run(name, tp=tp, impl="local"), groups)[0]
    model, layer = config.model, engine.decoder.layers[0]
    attention = layer.self_attention
    assert attention.num_query_groups_per_partition == model.query_groups() // tp
    assert attention.core_attention.num_gqa_groups_per_partition == model.query_groups() // tp
    assert (attention.linear_qkv.bias is not None and attention.linear_qkv.bias.numel() > 0) is (
        model.add_qkv_bias
    )
    biased = getattr(attention.linear_qkv, "layer_norm_bias", None) is not None
    assert biased is (model.normalization == "LayerNorm")
    assert attention.linear_qkv.normalization == model.normalization
    assert layer.mlp.linear_fc1.eps == model.layernorm_epsilon
    rotary = engine.rotary_pos_emb.inv_freq
    assert rotary.equal(local.rotary_pos_emb.inv_freq)
    assert 2 * rotary.numel() == model.head_dim() * model.rotary_percent
    assert type(engine.output_layer) is type(local.output_layer)
    assert (type(engine.output_layer).__name__ == "NormHead") is model.norm_head


def _checkpoints_cross(name: str, tp: int, folder: str) -> None:
    import torch

    from megatron_ext.checkpoint.load import load
    from megatron_ext.checkpoint.save import save

    groups = start(run(name, tp=tp))
    local_run, engine_run = run(name, tp=tp, impl="local"), run(name, tp=tp)
    local, engine, back = (build(r, groups) for r in (local_run, engine_run, local_run))
    for model in (engine, back):
        for _, parameter in parameters(model):
            parameter.data.fill_(7.0)
    common = {"optimizer": None, "groups": groups}
    path = save(Path(folder, "local"), run=local_run, chunks=local, state=STATE, **common)
    load(path, run=engine_run, chunks=engine, **common)
    loaded = dict(parameters(engine))
    for key, parameter in parameters(local):
        assert torch.equal(parameter, loaded[key]), key
    path = save(Path(folder, "engine"), run=engine_run, chunks=engine, state=STATE, **common)
    load(path, run=local_run, chunks=back, **common)
    returned = dict(parameters(back))
    for key, parameter in parameters(local):
        assert torch.equal(parameter, returned[key]), key


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_checkpoint_keys_are_those_of_the_local_layers(name: str, tp: int) -> None:
    on_ranks(_same_layout, name, tp)


@pytest.mark.parametrize("name", ["index_1p9b", "stablelm2_1p6b", "yi_34b"])
def test_initial_weights_are_those_of_the_local_layers(name: str) -> None:
    on_ranks(_same_initial_weights, name, 2)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["index_1p9b_32k", "stablelm2_1p6b", "yi_34b_200k"])
def test_every_idea_of_the_model_reaches_the_layers(name: str, tp: int) -> None:
    on_ranks(_ideas, name, tp)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_local_checkpoint_loads_into_the_fused_layers_and_back_bit_for_bit(
    name: str, tp: int, tmp_path: Path
) -> None:
    try:
        narrow(name).check(ParallelConfig(tensor_model_parallel_size=tp))
    except ValueError as refusal:
        pytest.skip(str(refusal))
    run_on_ranks(_checkpoints_cross, name, tp, str(tmp_path), world_size=tp)

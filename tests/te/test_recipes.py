"""FP8 recipes, packing arguments and the attention back end reach Transformer Engine as meant."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from megatron_ext.config import RunConfig
from megatron_ext.devices import cuda
from megatron_ext.devices.config import KernelsConfig, PrecisionConfig
from megatron_ext.testing import run_on_ranks
from tests.te.test_layout import build, run, start

ROOT = Path(__file__).parents[2]
RECIPES = {
    "fp8_delayed": "DelayedScaling",
    "fp8_current": "Float8CurrentScaling",
    "fp8_block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
CAPABILITIES = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]


def precise(name: str, precision: str) -> RunConfig:
    text = (ROOT / "conf" / "precision" / f"{precision}.yaml").read_text()
    model = replace(run(name).model, kv_channels=32, ffn_hidden_size=64, num_layers=4)
    return replace(run(name), precision=PrecisionConfig(**yaml.safe_load(text)), model=model)


def _recipe(precision: str) -> None:
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_ext.models.gpt import transformer_config

    config = precise("index_1p9b", precision)
    start(config)
    recipe = get_fp8_recipe(transformer_config(config))
    assert type(recipe).__name__.endswith(RECIPES[precision])
    if precision == "fp8_delayed":
        assert (recipe.margin, recipe.amax_history_len) == (0, 1024)
        assert recipe.amax_compute_algo == "max"
    hybrid = "E4M3" if config.precision.fp8 == "e4m3" else "HYBRID"
    assert recipe.fp8_format.name == hybrid


def _support(precision: str) -> None:
    """Transformer Engine's own check at each capability, against our table."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch import quantization

    from megatron_ext.models.gpt import transformer_config
    from tests.te.fake_extension import pretending

    config = precise("index_1p9b", precision)
    start(config)
    recipe = get_fp8_recipe(transformer_config(config))
    for capability in CAPABILITIES:
        for cached in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
            setattr(quantization, cached, None)
        answer = mock.patch.object(
            quantization, "get_device_compute_capability", lambda seen=capability: seen
        )
        with pretending(capability), answer:
            try:
                quantization.check_recipe_support(recipe)
                able = True
            except (AssertionError, RuntimeError):
                able = False
        assert able is cuda.can_run(precision, capability), (precision, capability)


def _packing(name: str) -> None:
    """What Megatron hands to Transformer Engine's attention for packed documents."""
    import torch
    import transformer_engine.pytorch as te

    from megatron_ext.models.isolation import _attend

    config = run(name)
    start_groups = start(config)
    attention = build(config, start_groups)[0].decoder.layers[0].self_attention
    seen: dict[str, Any] = {}

    def record(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return query.flatten(1)

    heads, groups = config.model.num_attention_heads, config.model.query_groups()
    parts = [torch.zeros(7, n, 8, dtype=torch.bfloat16) for n in (heads, groups, groups)]
    with mock.patch.object(te.DotProductAttention, "forward", record):
        _attend(attention, *parts, [3, 4])
    assert seen["qkv_format"] == "thd" and seen["attn_mask_type"] == "padding_causal"
    assert seen["cu_seqlens_q"].tolist() == seen["cu_seqlens_kv"].tolist() == [0, 3, 7]
    assert seen["max_seqlen_q"] == 4


def _backend(word: str) -> None:
    config = replace(run("index_1p9b"), kernels=KernelsConfig(attention_backend=word))
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
    build(config, start(config))
    on = {n for n in ("FLASH", "FUSED", "UNFUSED") if os.environ[f"NVTE_{n}_ATTN"] == "1"}
    assert on == ({"FLASH", "FUSED", "UNFUSED"} if word == "auto" else {word.upper()})


def _first_forward() -> None:
    import torch

    config = run("index_1p9b")
    chunk = build(config, start(config))[0]
    tokens = torch.zeros(1, 8, dtype=torch.long)
    try:
        chunk(tokens, torch.arange(8)[None], None)
    except Exception as error:
        assert "CUDA" in str(error) or "GPU" in str(error), error
        return
    raise AssertionError("a kernel ran without a GPU")


@pytest.mark.parametrize("precision", sorted(RECIPES))
def test_each_precision_makes_the_recipe_it_names(precision: str) -> None:
    run_on_ranks(_recipe, precision, world_size=1)


@pytest.mark.parametrize("precision", sorted(RECIPES))
def test_transformer_engine_accepts_a_recipe_exactly_where_we_do(precision: str) -> None:
    run_on_ranks(_support, precision, world_size=1)


@pytest.mark.parametrize("name", ["index_1p9b", "yi_6b"])
def test_packed_documents_reach_the_attention_with_their_ends(name: str) -> None:
    run_on_ranks(_packing, name, world_size=1)


@pytest.mark.parametrize("word", ["auto", "flash", "fused", "unfused"])
def test_the_attention_back_end_asked_for_is_the_only_one_left_on(word: str) -> None:
    run_on_ranks(_backend, word, world_size=1)


def test_a_forward_without_a_gpu_is_refused_by_the_kernels() -> None:
    run_on_ranks(_first_forward, world_size=1)


IMPORT = """
import sys
{guard}
from megatron.core.models.gpt import gpt_layer_specs as specs
print(specs.HAVE_TE)
"""


def _import(guard: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", IMPORT.format(guard=guard)]
    bare = {key: value for key, value in os.environ.items() if not key.startswith("NVTE_")}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=bare)


def test_the_real_metapackage_alone_stops_megatron_and_the_guard_lets_it_start() -> None:
    broken = _import("")
    assert broken.returncode != 0 and "meta package" in broken.stderr
    guarded = _import("from megatron_ext.devices import probe; probe.guard(cuda=False)")
    assert guarded.returncode == 0, guarded.stderr
    assert guarded.stdout.split() == ["False"]

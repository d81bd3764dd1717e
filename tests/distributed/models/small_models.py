"""Small models on gloo ranks, for tests of what they compute."""

from typing import Any

import torch

from megatron_ext.config import RunConfig
from megatron_ext.devices.config import PrecisionConfig
from megatron_ext.models.config import ModelConfig
from megatron_ext.optim.config import OptimizerConfig
from megatron_ext.parallel import groups as parallel_groups
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.testing import env, meeting
from megatron_ext.train.config import PhaseConfig

V = 50
"""Padded to 64, so that with TP 2 the second rank holds real and padding rows."""

TP = {"tensor_model_parallel_size": 2}
TP_SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}


def small(*, dtype: str = "fp32", model: dict[str, Any] | None = None, **parallel: Any):
    """A run whose model has four layers of 64 channels."""
    shape: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": V,
        "make_vocab_size_divisible_by": 16,
    }
    return RunConfig(
        name="small",
        model=ModelConfig(**(shape | (model or {}))),
        phases=[PhaseConfig(tokens=1000)],
        parallel=ParallelConfig(**parallel),
        precision=PrecisionConfig(dtype=dtype),
        optimizer=OptimizerConfig(lr=1e-3),
    )


def build(run, **kwargs):
    """Groups and chunks of this rank."""
    groups = parallel_groups.start(run.parallel, env(), seed=run.seed, init_method=meeting())
    from megatron_ext.models.gpt import build_model

    return groups, build_model(run, groups, **kwargs)


def gather_rows(local, group):
    """A vocabulary-parallel tensor's rows, whole."""
    parts = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)


def positions(tokens):
    """Position of every token in its row."""
    return torch.arange(tokens.shape[1]).expand_as(tokens)

"""A checkpoint's model on this process alone, in fp32: for comparing, measuring and looking."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.config import RunConfig
from megatron_ext.convert.described import model_of
from megatron_ext.devices.config import PrecisionConfig
from megatron_ext.models.config import ModelConfig
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.parallel.env import Env


@contextmanager
def loaded(checkpoint: Path) -> Iterator[Any]:
    """The model of a checkpoint of any layout, in evaluation mode.

    Raises:
        ValueError: the checkpoint is damaged, or of no shape that can be built.
    """
    model, _ = model_of(checkpoint)
    run = alone(model)
    from megatron_ext.parallel import groups

    with torch.random.fork_rng(devices=[]):
        collection = groups.start(run.parallel, Env.read({}), seed=0)
        try:
            from megatron_ext.checkpoint.load import load
            from megatron_ext.models.gpt import build_model

            chunks = build_model(run, collection, wrap_ddp=False)
            load(checkpoint, run=run, chunks=chunks, optimizer=None, groups=collection)
            yield chunks[0].eval()
        finally:
            groups.stop()


def check_ids(checkpoint: Path, model: ModelConfig, largest: int, *, what: str) -> None:
    """Refuse text of another tokenizer: a token that the model of ``checkpoint`` has no row for.

    Raises:
        ValueError: naming ``what``, its ``largest`` id and the ids that there are.
    """
    if largest >= model.vocab_size:
        raise ValueError(
            f"{what} holds token id {largest}, and {checkpoint} has ids 0 to "
            f"{model.vocab_size - 1} (model.vocab_size={model.vocab_size}): the text was indexed "
            f"with another tokenizer; index it with the checkpoint's own (tools.prepare)."
        )


def alone(model: ModelConfig) -> RunConfig:
    """A run of one rank in fp32 that trains nothing."""
    return RunConfig(
        name="alone",
        model=model,
        phases=[],
        parallel=ParallelConfig(),
        precision=PrecisionConfig(dtype="fp32"),
    )


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits [B, S, vocabulary] of token ids [B, S], padding columns cut off."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return model(ids, positions, None)[..., : model.true_vocab_size]


def mean_loss(logits: Tensor, ids: Tensor) -> float:
    """Nats per token of ids [B, S], each predicted from the ones before it."""
    predicted = logits[:, :-1].flatten(0, 1).float()
    return float(torch.nn.functional.cross_entropy(predicted, ids[:, 1:].flatten()))

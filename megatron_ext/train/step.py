"""One optimizer step: micro-batches through Megatron's schedule, then the update.

Shape letters: B micro-batch, S sequence.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

Batch = dict[str, Tensor]


class Judge(Protocol):
    """Looks at a step before its update, on every rank, and may hold the update back."""

    def sound_gradients(self, loss: float, chunks: list[Any]) -> bool:
        """Loss of the whole job, and the chunks with their gradients as they were reduced."""

    def sound_norm(self, grad_norm: float) -> bool:
        """Norm of all gradients, before they are clipped."""


@dataclass(frozen=True)
class StepResult:
    """What one step, or one evaluation pass, came to over the whole job."""

    loss: float
    """Mean over the tokens that count, in nats."""

    loss_tokens: int
    updated: bool
    """False when the optimizer skipped the step because a gradient was not finite (fp16)."""

    grad_norm: float
    approved: bool = True
    """False when the judge held the update back."""


def packed_seq_params(cu_seqlens: Tensor) -> PackedSeqParams:
    """Megatron's description of documents laid end to end, from their cumulative ends ``[n+1]``."""
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def forward_step(
    batches: Iterator[Batch], model: torch.nn.Module, *, scale: float
) -> tuple[Tensor, Callable]:
    """Megatron's signature: the model's output for the next micro-batch, and its loss function."""
    batch = next(batches)
    packed = batch.get("cu_seqlens")
    loss_BS = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        packed_seq_params=None if packed is None else packed_seq_params(packed),
    )
    return loss_BS, partial(masked_loss, batch["loss_mask"], scale)


def masked_loss(mask_BS: Tensor, scale: float, loss_BS: Tensor) -> tuple[Tensor, int, Tensor]:
    """``scale`` times the sum of the losses that count; 0; sum and number of them for the log.

    With ``scale`` one over the job's tokens, micro-batches with different masks weigh by their
    tokens, and the gradients are final. Megatron would divide them by the second result after
    the backward pass: one more pass over every gradient, and two collectives.
    """
    mask_BS = mask_BS.to(torch.float32)
    total = (loss_BS.float() * mask_BS).sum()
    return total * scale, 0, torch.stack([total.detach(), mask_BS.sum()])


def run_schedule(
    chunks: list[Any],
    batches: Callable[[], Iterator[Batch]],
    *,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    forward_only: bool,
    groups: ProcessGroupCollection,
    scale: float = 1.0,
) -> tuple[float, int]:
    """Forward (and backward) over the micro-batches; every rank of the job must call this.

    ``batches`` makes a fresh iterator for each model chunk, as interleaving needs. The backward
    pass is that of ``scale`` times the sum of the losses.

    Returns:
        The loss summed over the job's tokens that count, and their number, on every rank.
    """
    iterators: Any = [batches() for _ in chunks]
    reports = get_forward_backward_func()(
        forward_step_func=partial(forward_step, scale=scale),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    place = next(chunks[0].parameters()).device  # a stage without losses has none to tell by
    return _total(reports, groups, place)


def _total(
    reports: list[Tensor], groups: ProcessGroupCollection, place: torch.device
) -> tuple[float, int]:
    """Sum over micro-batches and data-parallel ranks; the last stage tells the others.

    The sum is taken in fp64: fp32 would lose counts above 2**24 tokens.
    """
    if reports:
        total = torch.stack(reports).double().sum(0)
    else:
        total = torch.zeros(2, dtype=torch.float64, device=place)
    if groups.dp_cp.size() > 1:
        torch.distributed.all_reduce(total, group=groups.dp_cp)
    if groups.pp.size() > 1:
        last = torch.distributed.get_global_rank(groups.pp, groups.pp.size() - 1)
        torch.distributed.broadcast(total, src=last, group=groups.pp)
    loss, count = total.tolist()
    return loss, int(count)


def _count_tokens(batches: list[Batch], groups: ProcessGroupCollection) -> int:
    """Tokens of the whole job that count, from this rank's micro-batches."""
    count = torch.stack([batch["loss_mask"].sum(dtype=torch.int64) for batch in batches]).sum()
    if groups.dp_cp.size() > 1:
        torch.distributed.all_reduce(count, group=groups.dp_cp)
    return int(count)


def train_step(
    chunks: list[Any],
    optimizer: Any,
    batches: Callable[[], Iterator[Batch]],
    *,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    groups: ProcessGroupCollection,
    loss_tokens: int | None = None,
    judge: Judge | None = None,
) -> StepResult:
    """One update from ``num_microbatches`` micro-batches on each data-parallel rank.

    ``loss_tokens`` is how many tokens of the whole job count in this step. Without it, the
    micro-batches are read and their masks counted before the first forward pass.

    ``judge`` may hold the update back; then weights and moments are as they were and the step can
    be run again. With fp16 the loss scale may not be: Megatron has counted the step as one without
    an infinite gradient before its norm is known, and doubles the scale after so many of them.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    if loss_tokens is None:
        held = list(batches())
        batches = partial(iter, held)
        loss_tokens = _count_tokens(held, groups)
    total, count = run_schedule(
        chunks,
        batches,
        num_microbatches=num_microbatches,
        micro_batch_size=micro_batch_size,
        seq_length=seq_length,
        forward_only=False,
        groups=groups,
        scale=1.0 / max(loss_tokens, 1),
    )
    loss = total / max(count, 1)
    held_back = StepResult(loss, count, updated=False, grad_norm=float("nan"), approved=False)
    if judge is not None and not judge.sound_gradients(loss, chunks):
        return held_back
    try:
        with _judged(optimizer, judge):
            updated, grad_norm, _ = optimizer.step()
    except _HeldBackError:
        return held_back
    return StepResult(
        loss=loss,
        loss_tokens=count,
        updated=bool(updated),
        grad_norm=float(grad_norm or 0.0),
    )


class _HeldBackError(Exception):
    """The judge does not want this update."""


@contextmanager
def _judged(optimizer: Any, judge: Judge | None) -> Iterator[None]:
    """Shows ``judge`` the norm between Megatron's computing it and clipping by it.

    By then nothing is changed but copies of gradients, and fp16's loss scale: no second pass over
    them is needed.
    """
    if judge is None:
        yield
        return
    compute = optimizer.get_grad_norm

    def get_grad_norm() -> Any:
        norm = compute()
        if not judge.sound_norm(float(norm)):
            raise _HeldBackError
        return norm

    optimizer.get_grad_norm = get_grad_norm
    try:
        yield
    finally:
        del optimizer.get_grad_norm


def _finalize_model_grads(chunks: list[Any], num_tokens: Any, **groups: Any) -> None:
    """Megatron's reductions, without its division: the loss was divided instead."""
    finalize_model_grads(chunks, None, **groups)


def connect(chunks: list[Any], optimizer: Any) -> None:
    """Tell Megatron's schedules how to scale losses and finish gradients."""
    for chunk in chunks:
        config = chunk.config
        config.grad_scale_func = optimizer.scale_loss if config.fp16 else None
        config.finalize_model_grads_func = _finalize_model_grads
        config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync

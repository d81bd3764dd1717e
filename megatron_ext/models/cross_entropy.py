"""Per-token loss of logits that are split over the vocabulary, in one collective and no copies.

Shape legend: N tokens, V vocabulary columns of this rank. The logits are the only large tensor, and
they are worked on a block of rows that fits the cache at a time. The backward pass turns them into
their own gradient; in fp32 the forward pass has left their exponentials in them by then.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Size of a block of fp32 logits: half of a core's second-level cache; enough rows for a GPU."""

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""torch 2.13 renamed it."""


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        labels_N: Tensor,
        first_column: int,
        valid_columns: int,
        group: dist.ProcessGroup,
        z_loss_coefficient: float,
    ) -> Tensor:
        local_N = labels_N - first_column
        mine_N = (local_N >= 0) & (local_N < valid_columns)
        local_N = local_N.masked_fill(~mine_N, 0)
        log_sum_N, label_logit_N, top_N = _reduce_rows(logits_NV, local_N, mine_N, valid_columns)
        if dist.get_world_size(group) > 1:
            log_sum_N, label_logit_N = _over_ranks(log_sum_N, label_logit_N, group)
        ctx.save_for_backward(logits_NV, local_N, mine_N, log_sum_N, top_N)
        ctx.valid_columns, ctx.z_loss_coefficient = valid_columns, z_loss_coefficient
        loss_N = log_sum_N - label_logit_N
        if z_loss_coefficient:
            loss_N.addcmul_(log_sum_N, log_sum_N, value=z_loss_coefficient)
        return loss_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, local_N, mine_N, log_sum_N, top_N = ctx.saved_tensors
        grad_N = grad_N.float()
        # d(z * lse^2) = 2 z lse * softmax, so z-loss only scales the softmax's share.
        softmax_scale_N = grad_N * (1.0 + 2.0 * ctx.z_loss_coefficient * log_sum_N)
        label_grad_N = grad_N * mine_N
        power_scale_N = softmax_scale_N * (top_N - log_sum_N).exp()
        for rows in _blocks(logits_NV) if ctx.valid_columns else ():
            block = logits_NV[rows, : ctx.valid_columns]
            if block.dtype == torch.float32:  # exp(logit - top) already
                softmax = block.mul_(power_scale_N[rows].unsqueeze(1))
            else:
                softmax = block.float().sub_(log_sum_N[rows].unsqueeze(1)).exp_()
                softmax.mul_(softmax_scale_N[rows].unsqueeze(1))
            softmax.scatter_add_(1, local_N[rows].unsqueeze(1), -label_grad_N[rows].unsqueeze(1))
            if softmax is not block:
                block.copy_(softmax)
        logits_NV[:, ctx.valid_columns :] = 0.0
        return logits_NV, None, None, None, None, None


def _blocks(logits_NV: Tensor) -> list[slice]:
    rows, columns = logits_NV.shape
    step = max(1, BLOCK_BYTES.get(logits_NV.device.type, 1 << 28) // (4 * columns))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _reduce_rows(
    logits_NV: Tensor, local_N: Tensor, mine_N: Tensor, valid_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's log-sum-exp, label logit and largest logit of every token, in fp32.

    Padding is not seen. Logits in fp32 are left as exp(logit - largest).
    """
    if not valid_columns:  # a rank of padding only
        zeros = torch.zeros(len(logits_NV), device=logits_NV.device)
        return zeros - torch.inf, zeros, zeros
    label_logit_N = logits_NV.gather(1, local_N.unsqueeze(1)).squeeze(1).float()
    log_sums, tops = [], []
    for rows in _blocks(logits_NV):
        block = logits_NV[rows, :valid_columns].float()
        top = block.amax(dim=1, keepdim=True)
        total = block.sub_(top).exp_().sum(dim=1)
        log_sums.append(total.log_().add_(top.squeeze(1)))
        tops.append(top.squeeze(1))
    return torch.cat(log_sums), label_logit_N.masked_fill_(~mine_N, 0.0), torch.cat(tops)


def _over_ranks(
    log_sum_N: Tensor, label_logit_N: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and label logit over the whole vocabulary, from one gather."""
    mine = torch.stack((log_sum_N, label_logit_N))
    everyone = mine.new_empty(dist.get_world_size(group), *mine.shape)
    all_gather(everyone.view(-1, mine.shape[-1]), mine, group=group)
    return everyone[:, 0].logsumexp(dim=0), everyone[:, 1].sum(dim=0)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    first_column: int,
    valid_columns: int,
    group: dist.ProcessGroup,
    z_loss_coefficient: float = 0.0,
) -> Tensor:
    """Loss of each token, in the shape of ``labels``; the logits are used up.

    This rank's first column stands for token ``first_column``; its columns from ``valid_columns``
    on are padding and take no part. ``z_loss_coefficient`` adds the squared log-sum-exp.
    """
    loss_N = _VocabParallelCrossEntropy.apply(
        logits.view(-1, logits.shape[-1]),
        labels.reshape(-1),
        first_column,
        valid_columns,
        group,
        z_loss_coefficient,
    )
    return loss_N.view(labels.shape)

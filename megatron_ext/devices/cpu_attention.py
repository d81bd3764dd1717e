"""Causal attention for training on a CPU, in large matmuls where torch's kernel uses small ones.

Queries go in blocks, all query heads of a KV head stacked into one matmul against the keys up to
the block's end; no mask of the whole sequence exists. The probabilities stay for the backward pass
while they are small, which saves it one matmul in five and every exponential.

One layer of 6 query and 2 KV heads of 64 channels at 1024 tokens, one core, forward and backward:
46 ms against SDPA's 59 to 63 in fp32, 28 against 51 in bf16. docs/cpu_backend.md has more.

Shape legend: B micro-batch, N query heads, G KV heads, R = N/G, S sequence, D channels, P = B*G;
Q rows of a query block times R, K keys up to its end.
"""

import math
from typing import Any

import torch
from torch import Tensor

BLOCK = {torch.float32: 128, torch.bfloat16: 256}
"""Queries in a block. bf16 sums the gradients of keys over the blocks, so it takes fewer."""

KEPT_BYTES = 1 << 25
"""Probabilities of one layer that are kept; beyond, bf16 computes them again, fp32 takes SDPA."""


_softmax_backward = torch.ops.aten._softmax_backward_data.out


def suits(query: Tensor, key: Tensor) -> bool:
    """Whether training is faster here than with torch's kernel: on a CPU, a whole sequence.

    Grad mode is not asked: a layer that is recomputed must take the same way both times.
    """
    if query.device.type != "cpu" or query.dtype not in BLOCK:
        return False
    whole = query.shape[2] == key.shape[2] and query.shape[2] > BLOCK[query.dtype]
    return whole and (query.dtype == torch.bfloat16 or _probability_bytes(query) <= KEPT_BYTES)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[B, N, S, D] from queries of that shape and keys and values [B, G, S, D]."""
    return _CausalAttention.apply(query, key, value, scale)


def _probability_bytes(query: Tensor) -> int:
    b, n, s, _ = query.shape
    return b * n * s * (s + BLOCK[query.dtype]) // 2 * query.element_size()


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        b, n, s, d = q.shape
        q_PRSD = _grouped(q * scale, k.shape[1])
        k_PSD, v_PSD = (x.reshape(-1, s, d).contiguous() for x in (k, v))
        out = q.new_empty(s, b, n, d).permute(1, 2, 0, 3)
        out_PRSD = _grouped(out, k.shape[1])
        kept, keep = [], _probability_bytes(q) <= KEPT_BYTES
        for start, end in _blocks(s, q.dtype):
            p_PQK = _probabilities(q_PRSD, k_PSD, start, end)
            block = torch.bmm(p_PQK, v_PSD[:, :end])
            out_PRSD[:, :, start:end] = block.view(*out_PRSD.shape[:2], -1, d)
            if keep:
                kept.append(p_PQK)
        ctx.save_for_backward(q_PRSD, k_PSD, v_PSD, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_PRSD, k_PSD, v_PSD, *kept = ctx.saved_tensors
        b, n, s, d = grad.shape
        grad_PRSD = _grouped(grad, n // q_PRSD.shape[1])
        grad_q = grad.new_empty(s, b, n, d).permute(1, 2, 0, 3)
        grad_q_PRSD = _grouped(grad_q, n // q_PRSD.shape[1])
        grad_k, grad_v = torch.zeros_like(k_PSD), torch.zeros_like(v_PSD)
        for number, (start, end) in enumerate(_blocks(s, grad.dtype)):
            p = kept[number] if kept else _probabilities(q_PRSD, k_PSD, start, end)
            grad_out, q = (x[:, :, start:end].flatten(1, 2) for x in (grad_PRSD, q_PRSD))
            grad_v[:, :end].baddbmm_(p.transpose(1, 2), grad_out)
            grad_p = torch.bmm(grad_out, v_PSD[:, :end].transpose(1, 2))
            grad_scores = _softmax_backward(grad_p, p, -1, p.dtype, grad_input=grad_p)
            grad_k[:, :end].baddbmm_(grad_scores.transpose(1, 2), q)
            block = torch.bmm(grad_scores, k_PSD[:, :end]).mul_(ctx.scale)
            grad_q_PRSD[:, :, start:end] = block.view(*grad_q_PRSD.shape[:2], -1, d)
        return grad_q, grad_k.view(b, -1, s, d), grad_v.view(b, -1, s, d), None


def _grouped(x_BNSD: Tensor, groups: int) -> Tensor:
    """[B, N, S, D] -> [P, R, S, D]: the query heads of each KV head; a view where it can be."""
    return x_BNSD.unflatten(1, (groups, -1)).flatten(0, 1)


def _blocks(length: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    step = BLOCK[dtype]
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _probabilities(q_PRSD: Tensor, k_PSD: Tensor, start: int, end: int) -> Tensor:
    """[P, Q, K]: softmax over the keys up to each query; the rest of the block's square is 0."""
    rows = q_PRSD[:, :, start:end].flatten(1, 2)
    scores = torch.bmm(rows, k_PSD[:, :end].transpose(1, 2))
    size = end - start
    future = torch.full((size, size), -math.inf, dtype=scores.dtype).triu_(1)
    scores.view(*q_PRSD.shape[:2], size, end)[..., start:].add_(future)
    return torch.softmax(scores, dim=-1, out=scores)

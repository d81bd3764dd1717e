"""SDPA core attention is plain causal attention, document by document."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.models.attention import SDPACoreAttention

S, B, D = 24, 2, 8


def _attention():
    config = SimpleNamespace(context_parallel_size=1, kv_channels=D)
    return SDPACoreAttention(config, 1, None, "self")


def _plain(q, k, v):
    """Scores, mask and softmax written out, one batch element and head at a time."""
    s, b, n, d = q.shape
    out = torch.zeros(s, b, n, d, dtype=q.dtype)
    for j in range(b):
        for head in range(n):
            group = head * k.shape[2] // n
            scores = q[:, j, head] @ k[:, j, group].T / d**0.5
            hidden = torch.ones(s, k.shape[0]).triu(1 + k.shape[0] - s).bool()
            out[:, j, head] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, j, group]
    return out.reshape(s, b, n * d)


def _inputs(heads, groups, s=S):
    torch.manual_seed(heads)
    shapes = ((s, B, heads, D), (s, B, groups, D), (s, B, groups, D))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 1), (7, 1), (14, 2), (8, 2)])
def test_it_is_plain_causal_attention_for_any_number_of_queries_per_group(heads, groups):
    qkv = _inputs(heads, groups)
    got, want = _attention()(*qkv, None), _plain(*qkv)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    grads = torch.autograd.grad((got * weight).sum(), qkv)
    for grad, wanted in zip(grads, torch.autograd.grad((want * weight).sum(), qkv)):
        torch.testing.assert_close(grad, wanted)


def test_kv_heads_are_not_copied_per_query_head():
    q, k, v = _inputs(14, 2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _attention()(q, k, v, None)
    assert sum(t.numel() == q.numel() for t in saved) == 2  # the queries and the output
    assert sum(t.numel() == k.numel() for t in saved) == 2


def test_packed_documents_attend_as_if_alone():
    q, k, v = (x[:, 0] for x in _inputs(7, 1))
    ends = torch.tensor([0, 5, 6, 17, S], dtype=torch.int32)
    packed = _attention()(q, k, v, None, packed_seq_params=SimpleNamespace(cu_seqlens_q=ends))
    for start, end in itertools.pairwise(ends):
        alone = _plain(*(x[start:end].unsqueeze(1) for x in (q, k, v)))
        torch.testing.assert_close(packed[start:end], alone.squeeze(1))


@pytest.mark.parametrize("new", [1, 3])
def test_queries_after_a_cache_see_all_earlier_keys(new):
    q, k, v = _inputs(4, 2)
    got = _attention()(q[-new:], k, v, None)
    torch.testing.assert_close(got, _plain(q, k, v)[-new:])


def test_context_parallelism_is_refused_with_a_way_out():
    config = SimpleNamespace(context_parallel_size=2, kv_channels=D)
    with pytest.raises(ValueError, match=r"parallel\.context_parallel_size=2 needs Transformer"):
        SDPACoreAttention(config, 1, None, "self")

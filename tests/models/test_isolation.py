"""A run that packs documents starts only on an attention that keeps them apart."""

from typing import Any

import pytest
import torch

from megatron_ext.models.isolation import prove_isolation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Attention(torch.nn.Module):
    """As much of Megatron's SelfAttention as the proof looks at."""

    def __init__(self, core: torch.nn.Module) -> None:
        super().__init__()
        self.core_attention = core
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.num_attention_heads_per_partition = 4
        self.num_query_groups_per_partition = 2
        self.hidden_size_per_attention_head = 8
        self.attn_mask_type = None


class Leaky(torch.nn.Module):
    """Causal over the whole pack, whatever the document ends say."""

    def forward(self, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> torch.Tensor:
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads, is_causal=True, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)


class NotANumber(torch.nn.Module):
    def forward(self, q: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return q.flatten(1) * float("nan")


def local() -> torch.nn.Module:
    from types import SimpleNamespace

    from megatron_ext.devices import device

    device.start()
    from megatron_ext.models.attention import SDPACoreAttention

    config = SimpleNamespace(context_parallel_size=1, kv_channels=8)
    return SDPACoreAttention(config, 1, None, "self")


def test_the_local_attention_keeps_documents_apart() -> None:
    assert prove_isolation([Attention(local())]) <= 1e-6


@pytest.mark.parametrize("core", [Leaky, NotANumber])
def test_an_attention_that_lets_documents_see_each_other_is_refused(core: Any) -> None:
    with pytest.raises(ValueError, match="packing=document cannot be isolated by"):
        prove_isolation([Attention(core())])


def test_a_stage_without_attention_has_nothing_to_prove() -> None:
    assert prove_isolation([torch.nn.Linear(1, 1)]) == 0.0

"""Gradients in Megatron's buffers are those of plain autograd on the same weights."""

import pytest
import torch

from megatron_ext.testing import run_on_ranks
from tests.distributed.models.small_models import build, positions, small
from tests.distributed.models.test_gpt import SHAPES


def _buffers_hold_autograds_gradients(shape, packed):
    from megatron_ext.models.gpt import build_model
    from megatron_ext.train.step import packed_seq_params

    run = small(model=SHAPES[shape])
    groups, (wrapped,) = build(run)
    (plain,) = build_model(run, groups, wrap_ddp=False)
    tokens = torch.randint(0, 50, (1, 17))
    labels = tokens.roll(-1)
    ends = torch.tensor([0, 3, 4, 17], dtype=torch.int32)
    documents = packed_seq_params(ends) if packed else None
    for _ in range(2):  # twice, so that the second is added to the first
        for model in (wrapped, plain):
            loss = model(
                tokens, positions(tokens), None, labels=labels, packed_seq_params=documents
            )
            loss.sum().backward()
    want = dict(plain.named_parameters())
    for name, parameter in wrapped.module.named_parameters():
        torch.testing.assert_close(parameter.main_grad, want[name].grad, msg=name)
        assert parameter.grad is None


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("packed", [False, True])
def test_buffers_hold_the_gradients_of_autograd(shape, packed):
    run_on_ranks(_buffers_hold_autograds_gradients, shape, packed, world_size=1)

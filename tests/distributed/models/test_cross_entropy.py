"""The vocabulary-parallel loss is torch's cross entropy plus the squared log-sum-exp."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_ext.models import cross_entropy as ours
from megatron_ext.testing import run_on_ranks
from tests.distributed.models.small_models import build, small

S, B, COLUMNS = 11, 3, 64


def _agrees(ranks, true_vocab, z, dtype):
    run = small(model={"num_layers": 1}, tensor_model_parallel_size=ranks)
    groups, _ = build(run, wrap_ddp=False)
    ours.BLOCK_BYTES["cpu"] = 5 * COLUMNS * 4  # blocks of 5 and 10 rows, the last one short
    torch.manual_seed(2)
    logits = (torch.randn(S, B, COLUMNS) * 4).to(dtype)
    labels = torch.randint(0, true_vocab, (S, B))
    scale = torch.rand(S, B)

    want = logits[..., :true_vocab].float().clone().requires_grad_()
    flat = want.reshape(-1, true_vocab)
    want_loss = cross_entropy(flat, labels.reshape(-1), reduction="none").reshape(S, B)
    want_loss = want_loss + z * flat.logsumexp(-1).reshape(S, B).square()
    (want_loss * scale).sum().backward()

    width, rank = COLUMNS // ranks, groups.tp.rank()
    first = rank * width
    mine = logits[..., first : first + width].clone().requires_grad_()
    loss = ours.vocab_parallel_cross_entropy(
        mine.clone(),
        labels,
        first_column=first,
        valid_columns=max(0, min(width, true_vocab - first)),
        group=groups.tp,
        z_loss_coefficient=z,
    )
    (loss * scale).sum().backward()
    torch.testing.assert_close(loss, want_loss.detach())
    grad = torch.zeros(S, B, COLUMNS)
    grad[..., :true_vocab] = want.grad
    loose = {"rtol": 0.02, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(mine.grad.float(), grad[..., first : first + width], **loose)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize("true_vocab", [50, 64, 20])  # 20: the second rank holds padding only
def test_loss_and_gradient_are_the_dense_ones(ranks, z, true_vocab):
    run_on_ranks(_agrees, ranks, true_vocab, z, torch.float32, world_size=ranks)


def test_bf16_logits_are_reduced_in_fp32():
    run_on_ranks(_agrees, 2, 50, 1e-3, torch.bfloat16, world_size=2)


def _z_loss_is_for_training_only():
    _, (chunk,) = build(small(model={"z_loss_coefficient": 1.0}), wrap_ddp=False)
    logits, labels = torch.randn(4, 2, COLUMNS), torch.randint(0, 50, (2, 4))

    def loss():
        return chunk.compute_language_model_loss(labels, logits.clone())

    training = loss()
    chunk.eval()
    squared = logits[..., :50].logsumexp(-1).square().T
    torch.testing.assert_close(training, loss() + squared)


def test_validation_loss_has_no_z_loss_in_it():
    run_on_ranks(_z_loss_is_for_training_only, world_size=1)

"""Norm-Head against a dense reference, on one rank and on two, with a padded vocabulary."""

import math

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import cross_entropy

from megatron_ext.testing import run_on_ranks
from tests.distributed.models.small_models import TP, V, build, gather_rows, positions, small

S, B, H = 6, 2, 64
NORM_HEAD = {"norm_head": True, "num_layers": 1}


def _dense(hidden, weight, labels, *, attached):
    """Logits and loss over the true vocabulary, from the formula."""
    rows = weight[:V].float()
    norm = rows.square().sum(-1, keepdim=True).sqrt()
    logits = hidden @ (rows / (norm if attached else norm.detach())).T
    return logits, cross_entropy(logits.reshape(-1, V), labels.T.reshape(-1), reduction="none")


def _agrees_with_the_dense_head(tensor_parallel, attached):
    gradient = "attached" if attached else "detached"
    model = NORM_HEAD | {"norm_head_gradient": gradient}
    run = small(model=model, tensor_model_parallel_size=tensor_parallel)
    groups, (chunk,) = build(run, wrap_ddp=False)
    torch.manual_seed(5)
    hidden = torch.randn(S, B, H)
    labels = torch.randint(0, V, (B, S))
    scale = torch.rand(B, S)
    whole = gather_rows(chunk.output_layer.weight.detach(), groups.tp)
    assert whole.shape[0] == 64

    mine, head = hidden.clone().requires_grad_(), chunk.output_layer
    logits, _ = head(mine)
    everyone = gather_rows(logits.detach().movedim(-1, 0), groups.tp).movedim(0, -1)
    loss = chunk.compute_language_model_loss(labels, logits)
    (loss * scale).sum().backward()

    theirs = hidden.clone().requires_grad_()
    weight = whole.clone().requires_grad_()
    want_logits, want_loss = _dense(theirs, weight, labels, attached=attached)
    want_loss = want_loss.reshape(S, B).T
    (want_loss * scale).sum().backward()

    torch.testing.assert_close(everyone[..., :V], want_logits)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(gather_rows(head.weight.grad, groups.tp), weight.grad)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_logits_loss_and_gradients_are_the_dense_heads(tensor_parallel, attached):
    run_on_ranks(_agrees_with_the_dense_head, tensor_parallel, attached, world_size=tensor_parallel)


def _normalising_sends_nothing():
    _, (chunk,) = build(small(model=NORM_HEAD, **TP), wrap_ddp=False)
    counter = CommDebugMode()
    with counter:
        weight = chunk.output_layer.effective_weight()
        weight.sum().backward()
    assert counter.get_total_counts() == 0


def test_normalising_needs_no_communication_under_tensor_parallelism():
    run_on_ranks(_normalising_sends_nothing, world_size=2)


def _fresh_loss():
    model = NORM_HEAD | {"hidden_size": 256, "vocab_size": 4000}
    _, (chunk,) = build(small(model=model), wrap_ddp=False)
    torch.manual_seed(0)
    hidden = torch.randn(64, 2, 256)
    hidden /= hidden.square().mean(-1, keepdim=True).sqrt()  # unit RMS, as the final norm leaves it
    with torch.no_grad():
        logits, _ = chunk.output_layer(hidden)
        loss = chunk.compute_language_model_loss(torch.randint(0, 4000, (2, 64)), logits).mean()
    assert abs(float(loss) - (math.log(4000) + 0.5)) < 0.15
    plain = hidden @ chunk.output_layer.weight[:4000].detach().T
    assert float(plain.logsumexp(-1).mean()) < math.log(4000) + 0.1  # a plain head starts lower


def test_a_fresh_model_starts_half_a_nat_above_the_uniform_loss():
    run_on_ranks(_fresh_loss, world_size=1)


def _cache():
    _, (chunk,) = build(small(model=NORM_HEAD), wrap_ddp=False)
    head, hidden = chunk.output_layer, torch.randn(S, B, H)

    def logits():
        with torch.no_grad():
            return head(hidden)[0]

    chunk.eval()
    before = logits()
    assert head.effective_weight() is head.effective_weight()
    with torch.no_grad():
        head.weight.add_(torch.randn_like(head.weight))
    chunk.train()
    trained = logits()
    assert not torch.allclose(before, trained)
    chunk.eval()
    torch.testing.assert_close(logits(), trained)

    stored = {
        name: value.clone() for name, value in chunk.state_dict().items() if "_extra" not in name
    }
    assert torch.equal(stored["output_layer.weight"], head.weight)  # raw, and no cache beside it
    assert not any("eval" in name for name in stored)
    stored["output_layer.weight"] = torch.randn_like(head.weight)
    chunk.load_state_dict(stored, strict=False)  # without leaving evaluation
    assert not torch.allclose(logits(), trained)


def test_evaluation_caches_the_rows_and_training_or_loading_forgets_them():
    run_on_ranks(_cache, world_size=1)


def _padding_is_never_sampled(parallel, gathered):
    groups, (chunk,) = build(small(model=NORM_HEAD, **parallel), wrap_ddp=False)
    chunk.eval()
    tokens = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = chunk(tokens, positions(tokens), None, runtime_gather_output=gathered)
    if not gathered:
        logits = gather_rows(logits.movedim(-1, 0), groups.tp).movedim(0, -1)
    assert logits.shape[-1] == 64
    assert torch.isneginf(logits[..., V:]).all()
    assert torch.isfinite(logits[..., :V]).all()


@pytest.mark.parametrize(("parallel", "ranks"), [({}, 1), (TP, 2)])
@pytest.mark.parametrize("gathered", [True, False])
def test_padding_columns_are_masked_out_of_generation(parallel, ranks, gathered):
    run_on_ranks(_padding_is_never_sampled, parallel, gathered, world_size=ranks)

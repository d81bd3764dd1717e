"""The optimizer is Megatron's, decays what it should, and is AdamW whatever wraps it."""

import pytest
import torch

from megatron_ext.testing import run_on_ranks
from tests.distributed.checkpoint.small_run import LR, Training, small_run

DISTRIBUTED = {"use_distributed_optimizer": True}
KINDS = pytest.mark.parametrize(
    ("dtype", "layout"),
    [("fp32", {}), ("bf16", {}), ("fp32", DISTRIBUTED), ("bf16", DISTRIBUTED)],
    ids=["fp32", "bf16", "fp32_distributed", "bf16_distributed"],
)


def _named(training):
    return {id(p): name for chunk in training.chunks for name, p in chunk.named_parameters()}


def _what_is_decayed(run):
    from megatron_ext.optim.moments import held

    training = Training(run)
    names, decayed = _named(training), {}
    for one in held(training.optimizer):
        for group in one.inner.param_groups:
            if any(param is one.main for param in group["params"]):
                decayed[names[id(one.param)]] = group["weight_decay"]
    assert len(decayed) == len(names)
    for name, decay in decayed.items():
        spared = "norm" in name or name.endswith(".bias")
        assert decay == (0.0 if spared else 0.1), name
    assert set(decayed.values()) == {0.0, 0.1}


@KINDS
def test_norms_and_biases_are_not_decayed(dtype, layout):
    run = small_run(
        dtype=dtype, model={"normalization": "LayerNorm", "add_qkv_bias": True}, **layout
    )
    run_on_ranks(_what_is_decayed, run, world_size=1)


def _against_torch(run):
    """Three updates with set gradients, beside torch's plain AdamW on fp32 copies."""
    from megatron_ext.optim.build import set_learning_rate
    from megatron_ext.optim.moments import held

    training = Training(run)
    params = [p for chunk in training.chunks for p in chunk.parameters()]
    copies = [p.detach().float().clone().requires_grad_() for p in params]
    vectors = [c for c in copies if c.ndim == 1]
    matrices = [c for c in copies if c.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    noise = torch.Generator().manual_seed(0)
    for rate in (LR, LR / 2, LR / 4):
        set_learning_rate(training.optimizer, rate)
        for group in plain.param_groups:
            group["lr"] = rate
        for param, copy in zip(params, copies, strict=True):
            grad = 1e-3 * torch.randn(param.shape, generator=noise)  # norm below the clip
            param.main_grad.copy_(grad)
            copy.grad = grad
        training.optimizer.step()
        plain.step()
    by_param = {id(p): c for p, c in zip(params, copies, strict=True)}
    for one in held(training.optimizer):
        want = by_param[id(one.param)].detach().view(-1)[one.start :][: one.main.numel()]
        torch.testing.assert_close(one.main.detach().view(-1), want, rtol=1e-6, atol=1e-8)
    for param, copy in zip(params, copies, strict=True):
        torch.testing.assert_close(param.detach().float(), copy.detach().to(param.dtype).float())


@KINDS
def test_updates_are_those_of_adamw(dtype, layout):
    run = small_run(dtype=dtype, optimizer={"clip_grad": 0.0}, **layout)
    run_on_ranks(_against_torch, run, world_size=1)


def _rates(run):
    from megatron_ext.optim.build import set_learning_rate

    training = Training(run)
    set_learning_rate(training.optimizer, 0.125)
    for group in training.optimizer.param_groups:
        assert group["lr"] == group["max_lr"] == group["min_lr"] == 0.125


@KINDS
def test_no_other_rate_is_left_anywhere(dtype, layout):
    run_on_ranks(_rates, small_run(dtype=dtype, **layout), world_size=1)


def _moments_reset(run):
    from megatron_ext.optim.moments import MOMENTS, adam_step, held, reset_moments

    training = Training(run)
    assert adam_step(training.optimizer) == 0
    training.train(3)
    assert adam_step(training.optimizer) == 3
    reset_moments(training.optimizer)
    assert adam_step(training.optimizer) == 0
    for one in held(training.optimizer):
        assert not any(one.state()[name].any() for name in MOMENTS)
    weights = [one.main.detach().clone() for one in held(training.optimizer)]
    after_reset = training.train(1)
    fresh = Training(run, beside=training)
    with torch.no_grad():
        for one, weight in zip(held(fresh.optimizer), weights, strict=True):
            one.main.copy_(weight)
            if one.has_master():
                flat = one.param.view(-1)[one.start :][: weight.numel()]
                flat.copy_(weight.view(-1))
    fresh.step = 3
    assert fresh.train(1) == after_reset
    for one, two in zip(held(fresh.optimizer), held(training.optimizer), strict=True):
        assert torch.equal(one.main, two.main)


@KINDS
def test_reset_moments_are_those_of_a_fresh_optimizer(dtype, layout):
    run_on_ranks(_moments_reset, small_run(dtype=dtype, **layout), world_size=1)


def _fused(run):
    inner = Training(run).optimizer.chained_optimizers[0].optimizer
    assert all(group["fused"] for group in inner.param_groups)


def test_the_fused_kernel_is_used():
    run_on_ranks(_fused, small_run(), world_size=1)

"""From one checkpoint, every layout trains along the curve of one rank."""

import json

import pytest
import torch

from megatron_ext.testing import run_on_ranks
from tests.distributed.models.small_models import PP, TP, TP_SP, VPP, build, positions, small

STEPS, BATCH, B, S = 20, 8, 2, 32
NORM_HEAD = {"norm_head": True, "z_loss_coefficient": 1e-4}


def _batches(step, groups):
    """This rank's micro-batches of one step, out of the same global batch everywhere."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 50, (BATCH, S + 1), generator=generator)
    mine = tokens[groups.dp.rank() :: groups.dp.size()]
    for rows in mine.split(B):
        yield {
            "tokens": rows[:, :-1].contiguous(),
            "labels": rows[:, 1:].contiguous(),
            "position_ids": torch.arange(S).expand(B, S),
            "loss_mask": (rows[:, 1:] > 9).float(),  # other counts on every rank
        }


def _train(run, *, start, save_to=None):
    """(loss, gradient norm) of each step, from the checkpoint at ``start`` if there is one."""
    from megatron_ext.checkpoint.load import load
    from megatron_ext.checkpoint.save import save
    from megatron_ext.optim.build import build_optimizer
    from megatron_ext.train.step import connect, train_step

    groups, chunks = build(run)
    optimizer = build_optimizer(run, chunks, groups)
    connect(chunks, optimizer)
    if save_to:
        state = {"step": 0, "tokens": 0}
        save(save_to, run=run, chunks=chunks, optimizer=optimizer, state=state, groups=groups)
    else:
        load(start, run=run, chunks=chunks, optimizer=None, groups=groups)
    curve = []
    for step in range(STEPS):
        result = train_step(
            chunks,
            optimizer,
            lambda step=step: _batches(step, groups),
            num_microbatches=BATCH // B // groups.dp.size(),
            micro_batch_size=B,
            seq_length=S,
            groups=groups,
        )
        curve.append((result.loss, result.grad_norm))
    return curve


def _one_rank(folder):
    curve = _train(small(model=NORM_HEAD), start=None, save_to=folder / "checkpoints")
    (folder / "curve.json").write_text(json.dumps(curve))


def _layout(folder, parallel, dtype):
    start = folder / "checkpoints" / "step_00000000"
    curve = _train(small(model=NORM_HEAD, dtype=dtype, **parallel), start=start)
    want = json.loads((folder / "curve.json").read_text())
    worst = max(abs(a - b) / b for one, other in zip(curve, want) for a, b in zip(one, other))
    assert worst < (1e-5 if dtype == "fp32" else 1e-2), (worst, curve, want)
    if torch.distributed.get_rank() == 0:
        print(f"{parallel} {dtype}: largest relative difference {worst:.2g}")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_rank")
    run_on_ranks(_one_rank, folder, world_size=1)
    return folder


ZERO = {"use_distributed_optimizer": True}
FULL = {"recompute_granularity": "full"}


@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [
        (TP, 2),
        (TP_SP, 2),
        (PP, 2),
        (VPP, 2),
        ({}, 2),
        (ZERO, 2),
        (TP | PP, 4),
        (TP_SP | PP | FULL, 4),
    ],
    ids=["tp2", "tp2-sp", "pp2", "vpp", "dp2", "dp2-zero", "tp2-pp2", "tp2-sp-pp2-recompute"],
)
def test_every_layout_follows_the_curve_of_one_rank(reference, parallel, ranks):
    run_on_ranks(_layout, reference, parallel, "fp32", world_size=ranks)


@pytest.mark.parametrize("parallel", [TP_SP, ZERO], ids=["tp2-sp", "dp2-zero"])
def test_bf16_stays_near_the_fp32_curve(reference, parallel):
    run_on_ranks(_layout, reference, parallel, "bf16", world_size=2)


def _gradients(run):
    _, (chunk,) = build(run)
    tokens = torch.randint(0, 50, (1, 200), generator=torch.Generator().manual_seed(0))
    chunk(tokens, positions(tokens), None, labels=tokens.roll(-1)).sum().backward()
    return {name: p.main_grad.clone() for name, p in chunk.named_parameters()}


def _recompute(folder, granularity):
    run = small(model=NORM_HEAD, recompute_granularity=granularity)
    grads = _gradients(run)
    want = torch.load(folder / "grads")
    assert grads.keys() == want.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, want[name]), name


def _plain_gradients(folder):
    torch.save(_gradients(small(model=NORM_HEAD)), folder / "grads")


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputing_activations_changes_no_gradient(tmp_path, granularity):
    run_on_ranks(_plain_gradients, tmp_path, world_size=1)
    run_on_ranks(_recompute, tmp_path, granularity, world_size=1)

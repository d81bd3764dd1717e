"""A resumed run is the uninterrupted one, bit for bit; under another layout its state still is."""

import random
from functools import partial

import numpy as np
import pytest
import torch

from megatron_ext.checkpoint.folder import describe
from megatron_ext.checkpoint.reader import TensorReader
from megatron_ext.checkpoint.rectangles import Box
from megatron_ext.checkpoint.save import save
from megatron_ext.testing import env, run_on_ranks
from tests.distributed.checkpoint.small_run import Training, small_run

TP = {"tensor_model_parallel_size": 2}
TP_SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = DISTRIBUTED | {"overlap_grad_reduce": True, "overlap_param_gather": True}


def _draws() -> list[float]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = float(torch.rand(()))
    return [random.random(), float(np.random.rand()), float(torch.rand(())), tracked]


def _save_then_go_on(folder, run):
    training = Training(run)
    training.train(2)
    _draws()
    save(folder / "first", **training.what())
    outcome = {"losses": training.train(3), "draws": _draws()}
    save(folder / "uninterrupted", **training.what())
    torch.save(outcome, folder / f"uninterrupted.{env().rank}")


def _resume(folder, run):
    training = Training(run)
    training.load(folder / "first" / "step_00000002")
    outcome = {"losses": training.train(3), "draws": _draws()}
    save(folder / "resumed", **training.what())
    want = torch.load(folder / f"uninterrupted.{env().rank}")
    assert outcome == want


def _same_tensors(path, other, *, random_streams=True):
    """Every number stored in both folders is the same, but for padding rows."""
    one, two = TensorReader(path), TensorReader(other)
    keys = {key for key in one.tensors if random_streams or not key.startswith("rng.")}
    assert keys == {key for key in two.tensors if random_streams or not key.startswith("rng.")}
    for key in sorted(keys):
        shape = tuple(map(min, one.tensors[key].shape, two.tensors[key].shape))
        box = Box((0,) * len(shape), shape)
        assert torch.equal(one.read(key, box), two.read(key, box)), key


@pytest.mark.parametrize(
    ("dtype", "world_size", "layout"),
    [
        ("fp32", 1, {}),
        ("fp16", 1, {}),
        ("bf16", 2, TP_SP),
        ("fp32", 2, DISTRIBUTED),
        ("bf16", 2, DISTRIBUTED),
        ("bf16", 2, OVERLAPPED),
        ("fp32", 2, VPP),
        ("bf16", 4, TP_SP | DISTRIBUTED),
    ],
    ids=["one", "fp16", "tp_sp", "dp_fp32", "dp_bf16", "overlapped", "vpp", "tp_dp"],
)
def test_resume_is_bit_exact(tmp_path, dtype, world_size, layout):
    run = small_run(dtype=dtype, **layout)
    run_on_ranks(_save_then_go_on, tmp_path, run, world_size=world_size)
    run_on_ranks(_resume, tmp_path, run, world_size=world_size)
    uninterrupted = tmp_path / "uninterrupted" / "step_00000005"
    resumed = tmp_path / "resumed" / "step_00000005"
    _same_tensors(uninterrupted, resumed)
    beside = describe(uninterrupted)["optimizer"]
    assert describe(resumed)["optimizer"] == beside
    assert beside["adam_step"] == 5
    assert bool(beside["loss_scale"]) == (dtype == "fp16")


def _train_and_save(folder, run):
    training = Training(run)
    training.train(2)
    save(folder, **training.what())


def _load_and_save(path, folder, run):
    training = Training(run)
    training.load(path)
    save(folder, **training.what())


@pytest.mark.parametrize(
    ("dtype", "world_size", "layout"),
    [
        ("bf16", 1, {}),
        ("bf16", 2, TP_SP | DISTRIBUTED),
        ("bf16", 2, VPP),
        ("bf16", 3, DISTRIBUTED),
        ("bf16", 4, TP | PP | DISTRIBUTED),
        ("fp32", 1, DISTRIBUTED),
        ("fp32", 3, DISTRIBUTED),
    ],
    ids=["one", "tp_sp", "vpp", "dp3", "tp_pp", "fp32_one", "fp32_dp3"],
)
def test_state_is_the_same_under_any_layout(tmp_path, saved_at_tp2_dp2, dtype, world_size, layout):
    path = saved_at_tp2_dp2(dtype)
    run = small_run(dtype=dtype, **layout)
    run_on_ranks(_load_and_save, path, tmp_path, run, world_size=world_size)
    _same_tensors(path, tmp_path / "step_00000002", random_streams=False)
    assert describe(tmp_path / "step_00000002")["optimizer"]["adam_step"] == 2


@pytest.fixture(scope="module")
def saved_at_tp2_dp2(tmp_path_factory):
    made = {}

    def path(dtype):
        if dtype not in made:
            folder = tmp_path_factory.mktemp(dtype)
            run = small_run(dtype=dtype, **TP, **DISTRIBUTED)
            run_on_ranks(_train_and_save, folder, run, world_size=4)
            made[dtype] = folder / "step_00000002"
        return made[dtype]

    return path


def _resumed_losses(path, out, run):
    training = Training(run)
    training.load(path)
    losses = training.train(4)
    if env().rank == 0:
        torch.save(losses, out)


def test_losses_go_on_alike_under_another_layout(tmp_path, saved_at_tp2_dp2):
    path, layouts = saved_at_tp2_dp2("fp32"), {"one": (1, {}), "tp_sp": (2, TP_SP), "pp": (2, PP)}
    for name, (world_size, layout) in layouts.items():
        run = small_run(**layout)
        run_on_ranks(_resumed_losses, path, tmp_path / name, run, world_size=world_size)
    want = torch.load(tmp_path / "one")
    for name in layouts:
        assert torch.load(tmp_path / name) == pytest.approx(want, rel=1e-5)


def _padding_is_zero_in_moments(path):
    from megatron_ext.optim.moments import MOMENTS, held

    training = Training(small_run(**TP))
    for one in held(training.optimizer):
        for name in MOMENTS:
            one.state()[name].fill_(1.0)  # which loading must not leave behind
    training.load(path)
    if env().rank == 1:  # holds rows 64 to 128, of which 112 to 128 are not stored
        weight = training.chunks[0].module.output_layer.weight
        (one,) = (one for one in held(training.optimizer) if one.param is weight)
        assert not any(one.state()[name][48:].any() for name in MOMENTS)
    save(path.parent / "again", **training.what())


def test_padding_rows_may_come_with_another_layout(tmp_path):
    """100 words are padded to 112 rows at TP 1 and to 128 at TP 2."""
    run_on_ranks(_train_and_save, tmp_path, small_run(), world_size=1)
    path = tmp_path / "step_00000002"
    run_on_ranks(_padding_is_zero_in_moments, path, world_size=2)
    _same_tensors(path, tmp_path / "again" / path.name, random_streams=False)


def test_a_bf16_run_becomes_an_fp32_run_without_rounding(tmp_path, saved_at_tp2_dp2):
    path = saved_at_tp2_dp2("bf16")
    run_on_ranks(_load_and_save, path, tmp_path, small_run(dtype="fp32"), world_size=1)
    before, after = TensorReader(path), TensorReader(tmp_path / "step_00000002")
    masters = [key for key in before.tensors if key.startswith("optimizer.state.fp32_param.")]
    assert masters
    for key in masters:
        name = key.removeprefix("optimizer.state.fp32_param.")
        assert torch.equal(before.read(key)[:100], after.read(name)[:100]), name


def test_an_fp32_run_becomes_a_bf16_run_with_its_weights_as_masters(tmp_path, saved_at_tp2_dp2):
    path = saved_at_tp2_dp2("fp32")
    run = small_run(dtype="bf16", **DISTRIBUTED)
    run_on_ranks(_load_and_save, path, tmp_path, run, world_size=2)
    before, after = TensorReader(path), TensorReader(tmp_path / "step_00000002")
    name = "decoder.layers.mlp.linear_fc1.weight"
    assert torch.equal(before.read(name), after.read(f"optimizer.state.fp32_param.{name}"))


def _change_rate(path, lr, weight_decay):
    """One step with another rate and decay than the checkpoint's: Adam's own formula decides."""
    from megatron_ext.optim.build import set_learning_rate

    run = small_run(optimizer={"lr": lr, "weight_decay": weight_decay})
    training = Training(run)
    training.load(path)
    for group in training.optimizer.param_groups:
        assert group["lr"] == group["max_lr"] == lr
        assert group["weight_decay"] in (0.0, weight_decay)
    set_learning_rate(training.optimizer, lr)
    weight = training.chunks[0].module.embedding.word_embeddings.weight
    before = weight.detach().clone()
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    training.optimizer.optimizer.param_groups[0]["betas"] = (0.0, 0.0)  # zero gradient: no update
    training.optimizer.step()
    decayed = before * (1 - lr * weight_decay)
    torch.testing.assert_close(weight.detach(), decayed, rtol=1e-6, atol=0)


def test_another_rate_and_decay_take_effect_after_a_resume(tmp_path):
    run = small_run(optimizer={"lr": 1e-2, "weight_decay": 0.1})
    run_on_ranks(_train_and_save, tmp_path, run, world_size=1)
    change = partial(_change_rate, tmp_path / "step_00000002", 5e-3, 0.5)
    run_on_ranks(change, world_size=1)

"""Depth up-scaling of trained checkpoints: logits as on the Hugging Face side, moments kept."""

from dataclasses import replace

import pytest
import torch

from megatron_ext.checkpoint.folder import verify
from megatron_ext.convert.described import model_of
from megatron_ext.convert.huggingface import open_folder
from megatron_ext.convert.sharded_reader import open_sharded
from megatron_ext.convert.to_huggingface import to_huggingface
from megatron_ext.convert.to_megatron import to_megatron
from megatron_ext.devices.config import PrecisionConfig
from megatron_ext.evaluate import alone
from megatron_ext.evaluate.layer_cosine import layer_cosines
from megatron_ext.surgery.layer_map import copy_blocks, insert_identities
from megatron_ext.surgery.upscale import upscale
from megatron_ext.testing import env, meeting, run_on_ranks
from tests.convert.models import make

IDS = torch.randint(0, 301, (1, 33), generator=torch.Generator().manual_seed(3))


def trained(folder, source, tp, pp, out, steps=2):
    """Some steps from ``source`` at a layout, saved with their moments."""
    from megatron_ext.checkpoint.load import load
    from megatron_ext.checkpoint.save import save
    from megatron_ext.models.gpt import build_model
    from megatron_ext.optim.build import build_optimizer
    from megatron_ext.parallel import groups
    from megatron_ext.train.step import connect, train_step

    run = alone.alone(model_of(folder / source)[0])
    run.precision = PrecisionConfig(dtype="bf16")
    run.parallel = replace(
        run.parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
    )
    collection = groups.start(run.parallel, env(), seed=1, init_method=meeting())
    chunks = build_model(run, collection)
    optimizer = build_optimizer(run, chunks, collection)
    connect(chunks, optimizer)
    has_moments = any(".exp_avg." in k for k in open_sharded(folder / source).tensors)
    state = load(
        folder / source,
        run=run,
        chunks=chunks,
        optimizer=optimizer,
        groups=collection,
        load_optimizer=has_moments,
    )
    tokens, labels = IDS[:, :-1], IDS[:, 1:]
    batch = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(32)[None],
    }
    losses = [
        train_step(
            chunks,
            optimizer,
            lambda: iter([batch]),
            num_microbatches=1,
            micro_batch_size=1,
            seq_length=32,
            groups=collection,
        ).loss
        for _ in range(steps)
    ]
    assert losses[-1] < losses[0]
    path = folder / out
    what = {"run": run, "chunks": chunks, "optimizer": optimizer, "groups": collection}
    save(path, state=state | {"step": 2, "tokens": 64, "phase": 0}, **what)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upscale")
    make("index", folder / "hf")
    to_megatron(folder / "hf", folder / "imported")
    run_on_ranks(trained, folder, "imported", 2, 2, "parent", world_size=4)
    return folder


PARENT = "parent/step_00000002"


def test_layers_and_moments_are_those_of_the_map(folder):
    layers = copy_blocks(4, [(1, 3)])
    before = open_sharded(folder / PARENT).tensors
    for moments in ("copy", "zero", "drop"):
        upscale(folder / PARENT, folder / moments, layers, moments=moments)
        verify(folder / moments)
        after = open_sharded(folder / moments).tensors
        assert any(key.startswith("optimizer.state.fp32_param") for key in after)
        for key in after:
            for number, new in enumerate(layers) if ".layers." in key else ():
                got, parent = after[key].read(number), before[key].read(new.parent)
                if moments == "zero" and "exp_avg" in key and new.copy:
                    assert not got.any() and parent.any()
                else:
                    assert torch.equal(got, parent), key
        dropped = {key for key in before if key not in after and not key.startswith("rng.")}
        assert bool(dropped) == (moments == "drop")
    assert model_of(folder / "copy")[0].num_layers == 6
    assert model_of(folder / "copy")[1]["layer_map"] == [0, 1, 2, 1, 2, 3]
    assert model_of(folder / "copy")[0].rotary_base == 320000.0


def test_the_same_map_on_the_hugging_face_side_gives_the_same_folder(folder, tmp_path):
    layers = copy_blocks(4, [(1, 3)])
    upscale(folder / PARENT, tmp_path / "deep", layers)
    to_huggingface(tmp_path / "deep", tmp_path / "deep_hf")
    to_huggingface(folder / PARENT, tmp_path / "parent_hf")
    parent = open_folder(tmp_path / "parent_hf").tensors
    deep = open_folder(tmp_path / "deep_hf").tensors
    for name, stored in deep.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(layers[int(parts[2])].parent)
        assert torch.equal(stored.read(), parent[".".join(parts)].read()), name
    assert len(deep) == len(parent) + 2 * 9


def same_function(folder, tmp_path):
    upscale(folder / PARENT, tmp_path / "pro", insert_identities(4, 2))
    with alone.loaded(folder / PARENT) as model:
        expected = alone.logits(model, IDS)
    with alone.loaded(tmp_path / "pro") as model:
        assert len(model.decoder.layers) == 6
        torch.testing.assert_close(alone.logits(model, IDS), expected)
        cosines = layer_cosines(model, [IDS])
    assert cosines[2] == pytest.approx(1.0) and cosines[5] == pytest.approx(1.0)
    assert max(cosines[:2]) < 0.999


def test_identity_layers_keep_the_function_and_have_cosine_one(folder, tmp_path):
    run_on_ranks(same_function, folder, tmp_path, world_size=1)


@pytest.mark.parametrize("moments", ["copy", "drop"])
def test_the_deeper_model_trains_on_at_another_layout(moments, folder, tmp_path):
    upscale(folder / PARENT, tmp_path / "deep", copy_blocks(4, [(1, 3)]), moments=moments)
    run_on_ranks(trained, tmp_path, "deep", 1, 3, "more", world_size=3)
    assert model_of(tmp_path / "more" / "step_00000002")[0].num_layers == 6

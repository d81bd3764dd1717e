"""Hugging Face -> Megatron at every legal TP x PP -> Hugging Face: not a bit changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ext.convert.described import model_of
from megatron_ext.convert.huggingface import open_folder
from megatron_ext.convert.to_huggingface import to_huggingface
from megatron_ext.convert.to_megatron import to_megatron
from megatron_ext.evaluate import alone
from megatron_ext.testing import env, meeting, run_on_ranks
from tests.convert.models import FAMILIES, make

LAYOUTS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 4), (2, 2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    for family in FAMILIES:
        make(family, folder / family)
        to_megatron(folder / family, folder / f"{family}.imported")
    return folder


def fits(family: str, folder: Path, tp: int) -> bool:
    model, _ = model_of(folder / f"{family}.imported")
    return model.query_groups() % tp == 0


def load_and_save(folder: Path, families: list[str], tp: int, pp: int, dtype: str) -> None:
    """On every rank: the imported checkpoint into a model of this layout, and out again."""
    from megatron_ext.checkpoint.load import load
    from megatron_ext.checkpoint.save import save
    from megatron_ext.models.gpt import build_model
    from megatron_ext.parallel import groups

    for number, family in enumerate(families):
        imported = folder / f"{family}.imported"
        run = alone.alone(model_of(imported)[0])
        run.precision.dtype = dtype
        run.parallel = replace(
            run.parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
        )
        if number == 0:
            collection = groups.start(run.parallel, env(), seed=1, init_method=meeting())
        chunks = build_model(run, collection, wrap_ddp=False)
        state = load(imported, run=run, chunks=chunks, optimizer=None, groups=collection)
        target = folder / f"{family}.{tp}x{pp}.{dtype}"
        save(target, run=run, chunks=chunks, optimizer=None, state=state, groups=collection)


def assert_same_bits(one: Path, other: Path) -> None:
    one, other = open_folder(one).tensors, open_folder(other).tensors
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].read(), other[name].read()), name


@pytest.mark.parametrize("tp, pp", LAYOUTS)
def test_every_family_goes_there_and_back_bit_exact(tp, pp, folders):
    families = [family for family in FAMILIES if fits(family, folders, tp)]
    assert families
    run_on_ranks(load_and_save, folders, families, tp, pp, "fp32", world_size=tp * pp)
    for family in families:
        back = folders / f"{family}.{tp}x{pp}.back"
        to_huggingface(folders / f"{family}.{tp}x{pp}.fp32" / "step_00000000", back)
        assert_same_bits(folders / family, back)


def test_a_bf16_checkpoint_goes_into_a_bf16_run_and_back(tmp_path):
    make("stablelm", tmp_path / "stablelm", dtype=torch.bfloat16)
    to_megatron(tmp_path / "stablelm", tmp_path / "stablelm.imported")
    run_on_ranks(load_and_save, tmp_path, ["stablelm"], 2, 1, "bf16", world_size=2)
    to_huggingface(tmp_path / "stablelm.2x1.bf16" / "step_00000000", tmp_path / "back")
    assert_same_bits(tmp_path / "stablelm", tmp_path / "back")

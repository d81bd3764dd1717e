"""verify: our model against transformers' on one rank, and the layer where they part by name."""

import pytest
import torch

from megatron_ext.convert.huggingface import open_folder
from megatron_ext.convert.to_megatron import to_megatron
from megatron_ext.evaluate.parity import verify
from megatron_ext.testing import run_on_ranks
from tests.convert.models import FAMILIES, make

IDS = {"random": torch.randint(0, 301, (1, 48), generator=torch.Generator().manual_seed(3))}


def compare_all(folder):
    for family in FAMILIES:
        make(family, folder / family)
        to_megatron(folder / family, folder / f"{family}.mc")
        (parity,) = verify(folder / family, folder / f"{family}.mc", IDS)
        assert parity.agrees, parity.as_text()
        assert parity.same_next_token == 1.0 and parity.largest_difference < 1e-4
        assert parity.loss == pytest.approx(parity.reference_loss, abs=1e-5)


def test_every_family_computes_what_transformers_does(tmp_path):
    run_on_ranks(compare_all, tmp_path, world_size=1)


def change_one_layer(folder):
    make("llama", folder / "hf")
    to_megatron(folder / "hf", folder / "mc")
    stored = open_folder(folder / "hf").tensors["model.layers.2.self_attn.o_proj.weight"]
    with open(stored.path, "r+b") as file:
        file.seek(stored.begin)
        file.write(torch.full((50,), 0.5).numpy().tobytes())
    (parity,) = verify(folder / "hf", folder / "mc", IDS)
    assert parity.first_departing == "layer 2"
    assert "DEPART, first at layer 2" in parity.as_text()
    assert parity.layers["layer 1"] < 1e-5


def test_the_first_layer_that_departs_is_named(tmp_path):
    run_on_ranks(change_one_layer, tmp_path, world_size=1)

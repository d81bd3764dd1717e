"""Hugging Face folders made from the fused layers' checkpoints are those of the local ones."""

import hashlib
from pathlib import Path

import pytest

from megatron_ext.testing import run_on_ranks
from tests.te.test_layout import STATE, build, parameters, run, start


def _export_both(name: str, folder: str) -> None:
    from megatron_ext.checkpoint.save import save
    from megatron_ext.convert.to_huggingface import to_huggingface

    config = run(name)
    groups = start(config)
    digests = []
    for impl in ("auto", "local"):
        config = run(name, impl=impl)
        chunks = build(config, groups)
        path = save(
            Path(folder, impl),
            run=config,
            chunks=chunks,
            optimizer=None,
            state=STATE,
            groups=groups,
        )
        target = Path(folder, f"hf_{impl}")
        to_huggingface(path, target)
        weights = sorted(target.glob("*.safetensors"))
        assert weights and sum(p.numel() for _, p in parameters(chunks)) > 0
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in weights])
    assert digests[0] == digests[1]


def _import_into_both(name: str, folder: str) -> None:
    import torch

    from megatron_ext.checkpoint.load import load
    from megatron_ext.checkpoint.save import save
    from megatron_ext.convert.to_huggingface import to_huggingface
    from megatron_ext.convert.to_megatron import to_megatron

    config = run(name, impl="local")
    groups = start(config)
    common = {"optimizer": None, "groups": groups}
    local, engine = build(config, groups), build(run(name), groups)
    path = save(Path(folder, "saved"), run=config, chunks=local, state=STATE, **common)
    to_huggingface(path, Path(folder, "hf"))
    imported = Path(folder, "imported")
    to_megatron(Path(folder, "hf"), imported)
    made = next((p.parent for p in imported.rglob("COMPLETE")), imported)
    for _, parameter in parameters(engine):
        parameter.data.fill_(7.0)
    load(made, run=run(name), chunks=engine, **common)
    true = config.model.vocab_size
    loaded = dict(parameters(engine))
    for key, parameter in parameters(local):
        rows = slice(true) if key.startswith(("embedding.", "output_layer.")) else slice(None)
        assert torch.equal(parameter[rows], loaded[key][rows]), key


@pytest.mark.parametrize("name", ["index_1p9b", "stablelm2_1p6b", "skywork_13b", "yi_6b"])
def test_both_specs_export_the_same_bytes(name: str, tmp_path: Path) -> None:
    run_on_ranks(_export_both, name, str(tmp_path), world_size=1)


@pytest.mark.parametrize("name", ["index_1p9b", "stablelm2_1p6b", "skywork_13b", "yi_6b"])
def test_a_hugging_face_folder_loads_into_the_fused_layers(name: str, tmp_path: Path) -> None:
    run_on_ranks(_import_into_both, name, str(tmp_path), world_size=1)

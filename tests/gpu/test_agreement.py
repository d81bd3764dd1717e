"""The same weights give the same numbers: Transformer Engine, the local layers, and a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import GPUS
from tests.gpu.runs import script

IMPLEMENTATIONS = ["transformer_engine", "local"] if GPUS else ["local"]

# Largest difference over the largest reference value. Transformer Engine's fp32 matmuls use TF32
# (10 bits of mantissa); bf16 has 7, through four layers and back.
TOLERANCE = {
    ("transformer_engine", "fp32"): 5e-3,
    ("local", "fp32"): 1e-4,
    ("transformer_engine", "bf16"): 6e-2,
    ("local", "bf16"): 6e-2,
}
ISOLATION = [("transformer_engine", b) for b in ("flash", "fused", "unfused")] + [("local", "auto")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A checkpoint made on the CPU, and the file of what it gives there in fp32."""
    folder = tmp_path_factory.mktemp("reference")
    return script("one_model", "make", str(folder), cpu=True), folder / "reference.safetensors"


def _load(path: str | Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def _distance(found: Any, wanted: Any) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


@pytest.mark.rehearsed
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_loss_and_gradients_agree_with_the_cpu(
    impl: str, dtype: str, reference: tuple[str, Path], tmp_path: Path, record: Any
) -> None:
    checkpoint, wanted_file = reference
    out = script("one_model", "read", checkpoint, impl, dtype, str(tmp_path / "found.safetensors"))
    found, wanted = _load(out), _load(wanted_file)
    assert set(found) == set(wanted)
    apart = {name: _distance(found[name], wanted[name]) for name in wanted}
    same_token = found["logits"].argmax(-1).eq(wanted["logits"].argmax(-1)).float().mean().item()
    worst = max(apart, key=lambda name: apart[name])
    record(
        "agreement",
        layers=impl,
        dtype=dtype,
        logits=apart["logits"],
        loss=apart["loss"],
        worst=f"{worst} {apart[worst]:.2e}",
        same_token=same_token,
        tolerance=TOLERANCE[impl, dtype],
    )
    assert apart[worst] <= TOLERANCE[impl, dtype], (worst, apart[worst])
    assert same_token > (0.97 if dtype == "bf16" else 0.99)


@pytest.mark.rehearsed
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_norm_heads_gradient_has_no_part_along_its_rows(
    impl: str, reference: tuple[str, Path], tmp_path: Path, record: Any
) -> None:
    out = script("one_model", "read", reference[0], impl, "fp32", str(tmp_path / "f.safetensors"))
    found = _load(out)
    grad, weight = (
        found["grad.output_layer.weight"][:509],
        found["weight.output_layer.weight"][:509],
    )
    along = (grad * weight).sum(-1).abs()
    lengths = (grad.norm(dim=-1) * weight.norm(dim=-1)).clamp(min=1e-12)
    share = float((along / lengths).max())
    record("norm_head", layers=impl, along_row=share)
    assert share < 1e-3


@pytest.mark.rehearsed
@pytest.mark.parametrize("impl, backend", ISOLATION)
def test_packed_documents_do_not_see_each_other(impl: str, backend: str, record: Any) -> None:
    if impl not in IMPLEMENTATIONS:
        pytest.skip("a rehearsal has the local layers only")
    try:
        said = script("one_model", "isolate", impl, backend, "bf16")
    except AssertionError as failure:
        if backend == "flash" and "No dot product attention" in str(failure):
            record("isolation", layers=impl, backend=backend, difference="flash-attn not installed")
            pytest.skip("flash-attn is not installed")
        raise
    record("isolation", layers=impl, backend=backend, difference=json.loads(said)["difference"])

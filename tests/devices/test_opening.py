"""A run says at its start which code it uses, and stops there if what it asked for is missing."""

from dataclasses import replace

import pytest

from megatron_ext.config import RunConfig
from megatron_ext.devices import device, opening, probe
from megatron_ext.devices.config import KernelsConfig, PrecisionConfig
from megatron_ext.devices.probe import ABSENT, BROKEN, USABLE, Probe
from megatron_ext.models.config import ModelConfig
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.train.config import PhaseConfig

SHAPE = ModelConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=100
)
RUN = RunConfig(name="x", model=SHAPE, phases=[PhaseConfig(tokens=1)])
FP8 = PrecisionConfig(fp8="hybrid", fp8_recipe="tensorwise")


def have(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, **states: str
) -> None:
    """This machine, were it of ``capability`` with libraries in these states."""
    found = {lib.name: Probe(lib.name, ABSENT) for lib in probe.LIBRARIES}
    found |= {name: Probe(name, state, "1.0", "why") for name, state in states.items()}
    monkeypatch.setattr(opening, "_capability", lambda: capability)
    monkeypatch.setattr(probe, "guard", lambda cuda: found)


def test_a_cpu_run_names_its_path() -> None:
    assert device.current().name == "cpu"
    text = "\n".join(opening.announce(RUN))
    assert "CPU over gloo" in text and "torch SDPA" in text and "layers: local" in text


def test_a_broken_library_is_warned_about_in_one_line_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    have(monkeypatch, (9, 0), transformer_engine=BROKEN)
    lines = opening.announce(RUN)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warnings == ["transformer_engine 1.0: broken (why); the run goes on without it"]
    assert any("no fused norm and linear, no FP8" in line for line in lines)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"kernels": KernelsConfig(transformer_impl="transformer_engine")}, "transformer_impl"),
        ({"precision": FP8}, "precision=fp8_current needs transformer_engine"),
        ({"parallel": ParallelConfig(context_parallel_size=2)}, "context_parallel_size=2 needs"),
        ({"parallel": ParallelConfig(tp_comm_overlap=True)}, "tp_comm_overlap=true needs"),
        ({"kernels": KernelsConfig(attention_backend="fused")}, "attention_backend=fused needs"),
        (
            {"kernels": KernelsConfig(gradient_accumulation_fusion=True)},
            "gradient_accumulation_fusion=true needs fused_weight_gradient",
        ),
    ],
)
def test_what_was_asked_for_and_is_broken_stops_the_run(
    changed: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, (9, 0), transformer_engine=BROKEN)
    with pytest.raises(ValueError, match=words):
        opening.announce(replace(RUN, **changed))  # type: ignore[arg-type]
    have(monkeypatch, (9, 0), transformer_engine=USABLE, fused_weight_gradient=USABLE)
    opening.announce(replace(RUN, **changed))  # type: ignore[arg-type]


def test_flash_attention_asked_for_needs_one_of_its_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flash = replace(RUN, kernels=KernelsConfig(attention_backend="flash"))
    have(monkeypatch, (9, 0), transformer_engine=USABLE)
    with pytest.raises(ValueError, match="attention_backend=flash needs flash_attn_2"):
        opening.announce(flash)
    have(monkeypatch, (9, 0), transformer_engine=USABLE, flash_attn_3=USABLE)
    assert any("flash_attn_3 1.0" in line for line in opening.announce(flash))


def test_a_precision_beyond_the_device_is_refused_before_its_library_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have(monkeypatch, (8, 0))
    with pytest.raises(ValueError, match="cannot run on this machine"):
        opening.announce(replace(RUN, precision=FP8))


def test_cuda_variables_are_set_unless_they_are_there() -> None:
    run = replace(
        RUN, parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    )
    environ: dict[str, str] = {}
    opening.set_environment(run, environ)
    assert environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    environ = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    opening.set_environment(run, environ)
    assert environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"

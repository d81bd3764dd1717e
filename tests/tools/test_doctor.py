"""tools.doctor says what is here, what a recipe would use, and what adds the rest."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.devices import paths, probe
from megatron_ext.devices.machine import InstalledGpu, Machine, inspect_machine, parse_gpu
from megatron_ext.devices.probe import ABSENT, BROKEN, USABLE, Probe
from tools import doctor

ROOT = Path(__file__).parents[2]
H100 = InstalledGpu("NVIDIA H100 80GB HBM3", (9, 0), 79.6, "580.65")


def here(**changed: object) -> Machine:
    facts: dict[str, object] = {
        "python": "3.11",
        "system": "Linux",
        "has_driver": True,
        "nvcc": "",
        "torch": "2.14.1",
        "torch_cuda": "13.0",
        "gpus": [H100],
    }
    return Machine(**{**facts, **changed})  # type: ignore[arg-type]


def found(**states: Probe) -> dict[str, Probe]:
    absent = {lib.name: Probe(lib.name, ABSENT) for lib in probe.LIBRARIES}
    return {**absent, **states}


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This machine, were it one H100 with nothing but the core installed."""
    monkeypatch.setattr(doctor, "inspect_machine", here)
    monkeypatch.setattr(doctor, "_probes", lambda machine: found())
    return monkeypatch


def test_it_answers_within_a_second_of_cpu_time_and_imports_neither_torch_nor_megatron() -> None:
    script = (
        "import sys, time; from tools.doctor import main; main([]); heavy = 'torch megatron hydra';"
        "print([m for m in heavy.split() if m in sys.modules], time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded, _, seconds = done.stdout.splitlines()[-1].rpartition(" ")
    assert loaded == "[]" and float(seconds) < 1


def test_it_works_where_nothing_is_installed_at_all(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "tools.doctor", "--json"],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert {"what": "psutil", "why": "the core needs it"}.items() <= report["missing"][-1].items()
    assert all(p["version"] == "" for p in report["core"])


def test_the_torch_build_is_read_without_importing_it() -> None:
    import torch

    machine = inspect_machine()
    assert machine.torch == torch.__version__
    assert machine.torch_cuda == (torch.version.cuda or "")


@pytest.mark.parametrize(
    "line, gpu",
    [
        ("NVIDIA H100 80GB HBM3, 9.0, 81559, 580.65", H100),
        ("NVIDIA GB10, 12.1, [N/A], 580.95", InstalledGpu("NVIDIA GB10", (12, 1), 0.0, "580.95")),
        ("No devices were found", None),
    ],
)
def test_the_drivers_answer_is_read(line: str, gpu: InstalledGpu | None) -> None:
    assert parse_gpu(line) == gpu


def test_a_recipe_names_its_path_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["recipe=index_1p9b/pretrain", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recipe"]["refused"] == ""
    parts = {path["part"]: path["taken"] for path in report["recipe"]["paths"]}
    assert {"device", "layers", "attention", "optimizer, clipping"} <= set(parts)


def test_a_recipe_that_cannot_run_here_is_refused_with_the_nearest_device(
    h100: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["recipe=index_1p9b/pretrain", "cluster=plain"]
    assert doctor.main([*overrides, "precision=mxfp8"]) == 2
    text = capsys.readouterr().out
    assert "nearest device being b200" in text
    assert "refused on cluster.hardware=h100" in text
    assert doctor.main([*overrides, "precision=fp8_block"]) == 2
    assert "needs transformer_engine, which is absent" in capsys.readouterr().out


def test_a_gpu_without_its_libraries_says_what_adds_them(
    h100: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.main([])
    text = capsys.readouterr().out
    assert "1 x NVIDIA H100 80GB HBM3 (Hopper, 79.6 GiB)" in text
    assert "transformer_engine: fused layers, FP8" in text and "--no-build-isolation" in text
    h100.setattr(doctor, "inspect_machine", lambda: here(torch_cuda="", torch="2.13.0+cpu"))
    doctor.main([])
    assert "a CUDA build of torch" in capsys.readouterr().out


def test_a_broken_library_is_listed_with_its_reason(
    h100: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Probe("apex", BROKEN, "", "the module at /x/apex is another project")
    h100.setattr(doctor, "_probes", lambda machine: found(apex=broken))
    doctor.main([])
    assert "apex: broken (the module at /x/apex is another project)" in capsys.readouterr().out
    assert paths.broken_lines(found(apex=broken)) == [
        "apex: broken (the module at /x/apex is another project); the run goes on without it"
    ]


def test_the_best_paths_are_taken_where_everything_works(
    h100: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = {lib.name: Probe(lib.name, USABLE, "1.0") for lib in probe.LIBRARIES}
    h100.setattr(doctor, "_probes", lambda machine: everything)
    assert doctor.main(["recipe=index_1p9b/pretrain", "precision=fp8_current", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    taken = {path["part"]: path for path in report["recipe"]["paths"]}
    assert taken["layers"]["taken"] == "Transformer Engine 1.0"
    assert "flash_attn_4" in taken["attention"]["taken"]
    assert all(path["cost"] == "" for path in taken.values())
    assert "first 1 and last 1 blocks in bf16" in taken["device"]["taken"]


def test_help_is_fast() -> None:
    started = time.process_time()
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    assert time.process_time() - started < 0.5

"""Broken installations of optional libraries are named in one line and kept out of Megatron."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.devices.probe import ABSENT, BROKEN, IDLE, USABLE, Probe, require

ROOT = Path(__file__).parents[2]

REPORT = """
import json, sys
from megatron_ext.devices import probe
found = probe.guard(cuda=sys.argv[1] == "cuda")
hidden = [m for m in ("transformer_engine", "apex", "flash_attn") if sys.modules.get(m, 1) is None]
loaded = [m for m in ("torch", "megatron") if sys.modules.get(m)]
print(json.dumps([{n: [p.state, p.version, p.reason] for n, p in found.items()}, hidden, loaded]))
"""


class Site:
    """A folder of fake installations put first on the path of a fresh interpreter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, path: str, text: str = "") -> None:
        """Write one module file, and empty packages above it."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        for above in file.parents:
            if above == self.folder:
                break
            if not (above / "__init__.py").exists() and above.name.isidentifier():
                (above / "__init__.py").write_text("")
        file.write_text(text)

    def distribution(self, name: str, version: str, *, pure: bool = True) -> None:
        """Write the metadata that pip leaves."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: {str(pure).lower()}\n")

    def report(self, device: str) -> tuple[dict[str, list[str]], list[str], list[str]]:
        """What ``guard`` finds there, what it hides, and what it imported on the way."""
        path = f"{self.folder}:{ROOT}"
        done = subprocess.run(
            [sys.executable, "-c", REPORT, device],
            env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        found, hidden, loaded = json.loads(done.stdout)
        return found, hidden, loaded


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An empty folder for fakes, with a torch that costs nothing to import."""
    site = Site(tmp_path)
    site.module("torch.py")
    return site


def metapackage(site: Site) -> None:
    """Transformer Engine as ``pip install transformer-engine`` leaves it."""
    text = "raise RuntimeError('Found empty `transformer-engine` meta package installed.')\n"
    site.module("transformer_engine/__init__.py", text)
    site.distribution("transformer-engine", "2.20.2")


def test_nothing_installed_is_absent_and_nothing_is_hidden_or_imported(site: Site) -> None:
    found, hidden, loaded = site.report("cpu")
    assert {state for state, _, _ in found.values()} == {ABSENT}
    assert hidden == [] and loaded == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_metapackage_alone_is_named_and_hidden(site: Site, device: str) -> None:
    metapackage(site)
    found, hidden, _ = site.report(device)
    state, version, reason = found["transformer_engine"]
    assert (state, version) == (BROKEN, "2.20.2")
    assert "only the metapackage" in reason
    assert hidden == ["transformer_engine"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_core_library_without_its_extension_is_named_and_hidden(site: Site, device: str) -> None:
    metapackage(site)
    site.distribution("transformer-engine-cu13", "2.20.2", pure=False)
    found, hidden, _ = site.report(device)
    assert found["transformer_engine"][0] == BROKEN
    assert "without its PyTorch extension" in found["transformer_engine"][2]
    assert hidden == ["transformer_engine"]


def test_an_installation_that_looks_whole_and_fails_to_import_is_broken_on_cuda(site: Site) -> None:
    metapackage(site)
    site.distribution("transformer-engine-cu13", "2.20.2", pure=False)
    site.module("transformer_engine/wheel_lib/transformer_engine_torch.cpython-311.so")
    failing = "raise RuntimeError('cudnn shared object not found.')\n"
    (site.folder / "transformer_engine" / "__init__.py").write_text(failing)
    found, hidden, loaded = site.report("cuda")
    assert found["transformer_engine"][0] == BROKEN
    assert "cudnn shared object not found" in found["transformer_engine"][2]
    assert hidden == ["transformer_engine"] and loaded == ["torch"]


def test_a_working_installation_is_usable_on_cuda_and_hidden_on_cpu(site: Site) -> None:
    site.module("transformer_engine/pytorch/__init__.py")
    site.distribution("transformer-engine", "2.20.2", pure=False)
    found, hidden, _ = site.report("cuda")
    assert found["transformer_engine"][0] == USABLE and hidden == []
    found, hidden, loaded = site.report("cpu")
    assert found["transformer_engine"][0] == IDLE and hidden == ["transformer_engine"]
    assert loaded == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_foreign_apex_is_named_with_its_path_and_never_run(site: Site, device: str) -> None:
    site.module("apex/__init__.py", "raise SystemExit('foreign code ran')\n")
    found, hidden, _ = site.report(device)
    assert found["apex"][0] == BROKEN and "another project" in found["apex"][2]
    assert str(site.folder / "apex") in found["apex"][2]
    assert hidden == ["apex"]


def test_apex_without_its_compiled_part_is_broken(site: Site) -> None:
    site.module("apex/optimizers/__init__.py")
    found, hidden, _ = site.report("cuda")
    assert found["apex"][0] == BROKEN and "amp_C" in found["apex"][2]
    assert hidden == ["apex"]


def test_apex_with_its_compiled_part_is_usable_on_cuda(site: Site) -> None:
    site.module("apex/optimizers/__init__.py")
    site.module("amp_C.py")
    found, hidden, _ = site.report("cuda")
    assert found["apex"][0] == USABLE and hidden == []
    assert found["fused_weight_gradient"][0] == ABSENT


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_flash_attn_without_its_extension_says_what_it_breaks(site: Site, device: str) -> None:
    site.module("flash_attn/__init__.py")
    site.distribution("flash-attn", "2.8.3")
    found, hidden, _ = site.report(device)
    assert found["flash_attn_2"][0] == BROKEN
    assert "flash_attn_2_cuda" in found["flash_attn_2"][2]
    assert "Transformer Engine" in found["flash_attn_2"][2]
    assert hidden == ["flash_attn"]


def test_flash_attn_4_beside_no_flash_attn_2_keeps_the_package_visible(site: Site) -> None:
    site.module("flash_attn/cute/interface.py")
    site.distribution("flash-attn-4", "4.0.0b36")
    found, hidden, _ = site.report("cuda")
    assert found["flash_attn_4"][0] == USABLE and found["flash_attn_2"][0] == ABSENT
    assert hidden == []


def test_a_run_that_asked_for_a_broken_library_is_refused_with_the_way_out() -> None:
    broken = Probe("transformer_engine", BROKEN, "2.20.2", "only the metapackage is installed")
    with pytest.raises(
        ValueError, match=r"kernels\.transformer_impl=transformer_engine needs"
    ) as e:
        require(broken, asked_by="kernels.transformer_impl=transformer_engine")
    assert "metapackage" in str(e.value) and "pip install" in str(e.value)


@pytest.mark.parametrize("name", ["transformer_engine", "apex"])
def test_megatron_imports_beside_a_broken_library(site: Site, name: str) -> None:
    (site.folder / "torch.py").unlink()
    if name == "transformer_engine":
        metapackage(site)
    else:
        site.module("apex/__init__.py")
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "from megatron_ext.devices import probe; probe.guard(cuda=False)\n"
            "from megatron.core.models.gpt import gpt_layer_specs as specs\n"
            "print(specs.HAVE_TE, specs.HAVE_APEX)",
        ],
        env={"PYTHONPATH": f"{site.folder}:{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "False"]

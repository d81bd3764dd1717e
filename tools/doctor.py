"""What is installed here, what works, and which code a run would take on this machine.

python -m tools.doctor                                     this machine
python -m tools.doctor recipe=index_1p9b/pretrain          and the path of a recipe on it
python -m tools.doctor --json
python -m tools.doctor --imports                           try each import, in a process of its own
"""

import argparse
import ast
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.cli import refusing
from megatron_ext.devices import paths, probe
from megatron_ext.devices.cuda import architecture, capability_of, refuse_precision
from megatron_ext.devices.machine import Machine, inspect_machine
from megatron_ext.devices.probe import Probe, version_of

ROOT = Path(__file__).resolve().parents[1]
BUILT = ("te",)
"""Extras that a plain pip install does not give: they are compiled against the installed torch."""

IMPORT_NAMES = {
    "megatron-core": "megatron.core",
    "hydra-core": "hydra",
    "pillow": "PIL",
    "nvidia-dali-cuda130": "nvidia.dali",
    "transformer-engine": "transformer_engine.pytorch",
    "pytest-xdist": "xdist",
}
"""Distribution -> module, where the dashes alone do not tell."""


def main(argv: list[str] | None = None) -> int:
    """Inspect, print, and answer 2 when the recipe asked for cannot run here."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="recipe=NAME and dotted.key=VALUE")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--imports", action="store_true", help="import what is installed")
    args = parser.parse_intermixed_args(argv)
    report = examine(args.overrides, imports=args.imports)
    print(json.dumps(report, indent=2) if args.json else "\n".join(as_text(report)))
    return 2 if report["recipe"] and report["recipe"]["refused"] else 0


def examine(overrides: list[str], *, imports: bool) -> dict[str, Any]:
    """Everything this program knows, as plain JSON values."""
    machine = inspect_machine()
    found = _probes(machine)
    core, extras = _requirements()
    report: dict[str, Any] = {
        "machine": {**asdict(machine), "capability": machine.capability},
        "core": [_package(requirement, imports=imports) for requirement in core],
        "extras": {
            name: [_package(requirement, imports=imports) for requirement in requirements]
            for name, requirements in extras.items()
        },
        "gpu_libraries": [_library(p) for p in found.values()],
        "recipe": _recipe(overrides, machine, found) if overrides else None,
    }
    report["missing"] = _missing(report, machine)
    return report


def _probes(machine: Machine) -> dict[str, Probe]:
    """Probe in a child where a GPU is there: importing a broken build may end the process."""
    if machine.capability is None:
        return probe.probe_all(cuda=False)
    script = (
        "import json; from megatron_ext.devices import probe; "
        "print(json.dumps([vars(p) for p in probe.probe_all(cuda=True).values()]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or ["no message"])[-1]
        found = probe.probe_all(cuda=False)
        return {
            n: p if p.state == probe.ABSENT else Probe(n, probe.BROKEN, p.version, cause)
            for n, p in found.items()
        }
    return {p["name"]: Probe(**p) for p in json.loads(done.stdout.splitlines()[-1])}


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """CORE and EXTRAS of setup.py, read as data."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return values["CORE"], values["EXTRAS"]


def _package(requirement: str, *, imports: bool) -> dict[str, str]:
    """One requirement: what is asked, what is installed and, when wanted, whether it imports."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    version = version_of(name[0])
    found = {"name": name[0], "asked": requirement.partition(";")[0], "version": version}
    if version and imports:
        found["import"] = _import(IMPORT_NAMES.get(name[0], name[0].replace("-", "_")))
    return found


def _import(module: str) -> str:
    """``ok``, or the last line of what the import of one module said, in a child of its own."""
    first = "import torch; " if module.startswith("transformer_engine") else ""
    command = [sys.executable, "-W", "ignore", "-c", f"{first}import {module}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return "ok" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["died"])[-1]


def _library(found: Probe) -> dict[str, str]:
    return {
        "name": found.name,
        "state": found.state,
        "version": found.version,
        "reason": found.reason,
        "install": probe.install_of(found.name),
    }


def _recipe(overrides: list[str], machine: Machine, found: dict[str, Probe]) -> dict[str, Any]:
    """The way that a recipe would take here, or why it would be refused."""
    from launch.compose import compose

    job = compose(overrides)
    refused = ""
    try:
        paths.refuse_missing(job, found, capability=machine.capability)
    except ValueError as refusal:
        refused = str(refusal)
    chosen = paths.choose(job, found, capability=machine.capability)
    return {
        "overrides": overrides,
        "precision": job.precision.word(),
        "hardware": _on_hardware(job.cluster.hardware, job.precision.word()),
        "refused": refused,
        "paths": [] if refused else [asdict(path) for path in chosen],
    }


def _on_hardware(hardware: str, precision: str) -> str:
    """What the recipe's own cluster would say to its precision; empty where that is a CPU."""
    if hardware == "cpu":
        return ""
    capability = capability_of(hardware)
    try:
        refuse_precision(precision, capability, where=f"cluster.hardware={hardware}")
    except ValueError as refusal:
        return f"refused on cluster.hardware={hardware}: {refusal}"
    return f"precision={precision} runs on cluster.hardware={hardware}"


def _missing(report: dict[str, Any], machine: Machine) -> list[dict[str, str]]:
    """What this machine lacks that would change something, each with the command that adds it."""
    missing = [
        {"what": p["name"], "why": "the core needs it", "add": f"pip install '{p['asked']}'"}
        for p in report["core"]
        if not p["version"]
    ]
    if machine.has_driver and machine.gpus and not machine.torch_cuda:
        missing.append(
            {
                "what": "a CUDA build of torch",
                "why": f"{machine.gpus[0].name} is here, and torch {machine.torch} is a CPU build",
                "add": "pip install --force-reinstall torch==2.14.1",
            }
        )
    for library in report["gpu_libraries"]:
        if library["state"] == probe.BROKEN:
            why = library["reason"]
            missing.append({"what": library["name"], "why": why, "add": library["install"]})
    engine = next(x for x in report["gpu_libraries"] if x["name"] == "transformer_engine")
    if engine["state"] == probe.ABSENT and machine.capability is not None:
        why = "fused layers, FP8, context parallelism"
        missing.append({"what": engine["name"], "why": why, "add": engine["install"]})
    return missing


def as_text(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    machine = report["machine"]
    lines = [f"{machine['system']}, Python {machine['python']}, torch {machine['torch'] or 'none'}"]
    lines.append(_driver_line(machine))
    lines += ["", "core"] + [_package_line(p) for p in report["core"]]
    for name, packages in report["extras"].items():
        how = "docs/install.md" if name in BUILT else f"pip install -e '.[{name}]'"
        lines += ["", f"extra [{name}]: {how}"]
        lines += [_package_line(p) for p in packages]
    lines += ["", "GPU libraries"]
    for library in report["gpu_libraries"]:
        shown = Probe(library["name"], library["state"], library["version"], library["reason"])
        lines.append(f"  {shown.line()}")
    if report["recipe"]:
        lines += ["", f"{' '.join(report['recipe']['overrides'])} on this machine"]
        if report["recipe"]["refused"]:
            lines.append(f"  refused: {report['recipe']['refused']}")
        lines += [f"  {paths.Path(**path).line()}" for path in report["recipe"]["paths"]]
        lines += [f"  {report['recipe']['hardware']}"] if report["recipe"]["hardware"] else []
    lines += ["", "missing" if report["missing"] else "nothing is missing for what this machine is"]
    lines += [f"  {m['what']}: {m['why']}\n    {m['add']}" for m in report["missing"]]
    return lines


def _driver_line(machine: dict[str, Any]) -> str:
    build = (
        f"torch built for CUDA {machine['torch_cuda']}" if machine["torch_cuda"] else "CPU torch"
    )
    nvcc = f", nvcc {machine['nvcc']}" if machine["nvcc"] else ""
    if not machine["gpus"]:
        driver = "driver without a GPU" if machine["has_driver"] else "no NVIDIA driver"
        return f"{driver}{nvcc}, {build}: runs train on the CPU over gloo"
    names = sorted({gpu["name"] for gpu in machine["gpus"]})
    first = machine["gpus"][0]
    kind = architecture(tuple(first["capability"]))
    return (
        f"{len(machine['gpus'])} x {', '.join(names)} ({kind}, {first['memory_gib']} GiB), driver "
        f"{first['driver']}{nvcc}, {build}"
    )


def _package_line(package: dict[str, str]) -> str:
    state = package["version"] or "absent"
    imported = f", import {package['import']}" if "import" in package else ""
    return f"  {package['name']} {state}{imported}" + (
        "" if package["version"] else f" (pip install '{package['asked']}')"
    )


if __name__ == "__main__":
    sys.exit(refusing(main))

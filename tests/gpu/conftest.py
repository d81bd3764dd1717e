"""Proof on a GPU: skipped without one. ``make test-gpu`` runs it and writes a report.

``GPU_REHEARSAL=1`` runs what does not need CUDA on the CPU, with the local layers, so that these
tests do not rot where no GPU is at hand.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.devices.machine import inspect_machine

MACHINE = inspect_machine()
REHEARSAL = os.environ.get("GPU_REHEARSAL") == "1"
GPUS = len(MACHINE.gpus) if MACHINE.capability else 0
REASON = (
    "no GPU that torch can use: "
    f"{'driver' if MACHINE.has_driver else 'no driver'}, {len(MACHINE.gpus)} GPUs, torch "
    f"{MACHINE.torch or 'absent'} for CUDA {MACHINE.torch_cuda or 'none'}"
)
RECORDS: dict[str, list[dict[str, Any]]] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Name the marks of this folder."""
    config.addinivalue_line("markers", "rehearsed: also runs on a CPU under GPU_REHEARSAL=1")
    config.addinivalue_line("markers", "gpus(n): needs n GPUs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests; skip what this machine cannot run, saying why."""
    for item in items:
        if item.path.parent.name != "gpu":
            continue
        item.add_marker(pytest.mark.gpu)
        several = next((m.args[0] for m in item.iter_markers("gpus")), 1)
        rehearsed = REHEARSAL and item.get_closest_marker("rehearsed") is not None
        if not GPUS and not rehearsed:
            item.add_marker(pytest.mark.skip(reason=REASON))
        elif GPUS and several > GPUS:
            reason = f"needs {several} GPUs, this machine has {GPUS}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Any:
    """``record(section, **row)`` puts a row into the report."""

    def add(section: str, **row: Any) -> None:
        RECORDS.setdefault(section, []).append({**row, "test": request.node.name})

    return add


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave what was measured for tools.gpu_report."""
    if target := os.environ.get("GPU_RECORDS"):
        Path(target).write_text(json.dumps(RECORDS, indent=1))

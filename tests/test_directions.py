"""Imports run one way, and what must answer at once imports neither torch nor Megatron."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Room -> what it must never import. Written as what is forbidden, so a new room needs no entry.
FORBIDDEN = {
    "megatron_ext": {"launch", "tools", "tests", "hydra", "omegaconf"},
    "megatron_ext/convert": {"megatron", "megatron_ext.train", "megatron_ext.models.gpt"},
    "megatron_ext/plan": {"megatron_ext.train.loop", "megatron_ext.convert"},
    "megatron_ext/parallel": {"megatron_ext.train", "megatron_ext.models", "megatron_ext.data"},
    "megatron_ext/devices": {"megatron_ext.train", "megatron_ext.models.gpt", "megatron_ext.data"},
    "megatron_ext/models": {"megatron_ext.train", "megatron_ext.data", "megatron_ext.checkpoint"},
    "megatron_ext/data": {"megatron", "megatron_ext.models", "megatron_ext.checkpoint"},
    "megatron_ext/optim": {"megatron_ext.train.loop", "megatron_ext.data", "megatron_ext.models"},
    "launch": {"tests"},
    "tools": {"tests"},
}
COMMANDS = ["launch.train", "launch.submit", "launch.status", "launch.stop", "launch.resume"]
TOOLS = [f"tools.{p.stem}" for p in sorted((ROOT / "tools").glob("*.py")) if p.stem != "__init__"]


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_room_reaches_upwards():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for room, banned in FORBIDDEN.items()
        for path in (ROOT / room).rglob("*.py")
        for name in _imports(path)
        if any(name == b or name.startswith(f"{b}.") for b in banned)
    ]
    assert not wrong, "\n".join(wrong)


def _loaded_by(arguments: list[str]) -> set[str]:
    """Heavy packages that a command has imported when it ends."""
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('LOADED', *[m for m in ('torch', 'megatron', 'transformers', 'matplotlib')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


@pytest.mark.parametrize("module", COMMANDS + TOOLS)
def test_help_imports_nothing_heavy(module):
    assert _loaded_by([module, "--help"]) == set()


def test_composing_a_job_imports_nothing_heavy():
    assert _loaded_by(["launch.train", "recipe=quickstart", "--cfg", "job"]) == set()

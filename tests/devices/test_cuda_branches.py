"""Every place of ours that runs only on CUDA is in one list, with the GPU test that covers it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
LIST = ROOT / "tests" / "gpu" / "branches.yaml"
NEVER_ON_CUDA = {"megatron_ext/devices/cpu.py"}
WORDS = {"cuda", "nccl"}
NAMES = {"is_cuda", "uses_transformer_engine", "pin_memory"}


def _says_cuda(node: ast.AST) -> bool:
    """Whether this node alone shows a branch that only a GPU takes."""
    if isinstance(node, ast.Attribute):
        on_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
        return (on_torch and node.attr == "cuda") or node.attr in NAMES
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value in WORDS or node.value.startswith("cuda:")
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") in NAMES


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a scope without those of the functions and classes inside it."""
    for child in ast.iter_child_nodes(scope):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            continue
        yield child
        yield from _own_nodes(child)


def _scopes(node: ast.AST, name: str = "") -> Iterator[tuple[str, ast.AST]]:
    yield name or "module", node
    for child in ast.walk(node) if not name else ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and (name or _top(node, child)):
            yield from _scopes(child, f"{name}.{child.name}" if name else child.name)


def _top(module: ast.AST, child: ast.AST) -> bool:
    return child in getattr(module, "body", [])


def branches() -> set[str]:
    """``file:function`` of every place that says CUDA."""
    found = set()
    for room in ("megatron_ext", "launch", "tools"):
        for path in sorted((ROOT / room).rglob("*.py")):
            file = str(path.relative_to(ROOT))
            if file in NEVER_ON_CUDA:
                continue
            for name, scope in _scopes(ast.parse(path.read_text())):
                if any(_says_cuda(node) for node in _own_nodes(scope)):
                    found.add(f"{file}:{name}")
    return found


def gpu_tests() -> set[str]:
    """Names of the tests in tests/gpu."""
    return {
        node.name
        for path in (ROOT / "tests" / "gpu").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_cuda_branch_is_listed_and_no_listed_one_is_gone() -> None:
    listed = set(yaml.safe_load(LIST.read_text()))
    new, gone = sorted(branches() - listed), sorted(listed - branches())
    assert not new, f"add to {LIST.name}, with the GPU test that covers it: {new}"
    assert not gone, f"no such CUDA branch any more, remove from {LIST.name}: {gone}"


def test_every_listed_branch_names_a_gpu_test_that_exists() -> None:
    known = gpu_tests()
    for branch, covered in yaml.safe_load(LIST.read_text()).items():
        assert covered in known, f"{branch}: {covered} is no test of tests/gpu"


def test_the_check_sees_a_new_branch() -> None:
    source = """
def f():
    if torch.cuda.is_available():
        return "x"

class C:
    def g(self):
        return "nccl"
"""
    found = {
        name
        for name, scope in _scopes(ast.parse(source))
        if any(_says_cuda(node) for node in _own_nodes(scope))
    }
    assert found == {"f", "C.g"}

"""What would let text from outside run as code is nowhere in the source, whoever adds a file."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("megatron_ext", "launch", "tools")
# One unpickler with an allow-list, and Megatron's own in-job gathers of what this job's ranks made.
ALLOWED = {
    "megatron_ext/checkpoint/index.py": {"pickle.Unpickler"},
    "megatron_ext/checkpoint/ranks.py": {"all_gather_object", "broadcast_object_list"},
}
NEVER = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open"),
    *("joblib.load", "dill.load", "os.system", "os.popen", "subprocess.getoutput", "eval", "exec"),
    *("yaml.unsafe_load", "yaml.full_load", "hydra.utils.instantiate", "instantiate"),
    *("all_gather_object", "broadcast_object_list", "tarfile.extractall", "extractall"),
}
BARE = {"eval", "exec"}  # as a method it is something else: model.eval()


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _calls(path: Path) -> Iterator[tuple[ast.AST, str, dict[str, ast.expr]]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node, _name(node.func), {k.arg or "**": k.value for k in node.keywords}
        elif isinstance(node, ast.ClassDef):
            yield from ((node, _name(base), {}) for base in node.bases)


def _wrong(path: Path) -> Iterator[str]:
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    for node, called, words in _calls(path):
        where = f"{name}:{getattr(node, 'lineno', 0)} {called}"
        last = called.rpartition(".")[2]
        names = {called} if "." not in called else {called, last} - BARE
        if names & (NEVER - ALLOWED.get(name, set())):
            yield where
        given = {k: v.value for k, v in words.items() if isinstance(v, ast.Constant)}
        if called == "torch.load" and given.get("weights_only") is not True:
            yield f"{where} without weights_only=True"
        if last == "load" and called.startswith(("np.", "numpy.")) and given.get("allow_pickle"):
            yield f"{where} with allow_pickle"
        if given.get("shell") or given.get("trust_remote_code"):
            yield f"{where} with shell or trust_remote_code"
        if called == "yaml.load" and "Safe" not in ast.dump(words.get("Loader", ast.Name("none"))):
            yield f"{where} without a safe loader"


def test_nothing_in_the_source_runs_what_it_reads() -> None:
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert len(paths) > 100
    assert [wrong for path in paths for wrong in _wrong(path)] == []


def test_the_scan_sees_what_it_is_for(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import pickle, torch, yaml, subprocess, os\n"
        "pickle.load(f)\n"
        "torch.load(f)\n"
        "torch.load(f, weights_only=False)\n"
        "yaml.load(f, Loader=yaml.Loader)\n"
        "subprocess.run(x, shell=True)\n"
        "os.system(x)\n"
        "class U(pickle.Unpickler): pass\n"
        "AutoModel.from_pretrained(x, trust_remote_code=True)\n"
        "torch.distributed.all_gather_object(a, b)\n"
        "eval(x)\n"
    )
    assert len(list(_wrong(bad))) == 10

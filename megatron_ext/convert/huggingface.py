"""A Hugging Face model folder: what it holds, opened without reading a weight."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.convert.stored import Stored, bin_file, safetensors_file

SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"

ASSETS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "arcade100k.tiktoken",
    "LICENSE",
)
"""Small files that travel with the weights. Python files never do: no remote code is needed."""


@dataclass(frozen=True)
class HuggingFaceFolder:
    """An opened model folder."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]

    def assets(self) -> list[Path]:
        """Tokenizer and generation files that are there."""
        return [self.path / name for name in ASSETS if (self.path / name).is_file()]


def open_folder(path: Path) -> HuggingFaceFolder:
    """Find every tensor of a model folder.

    Raises:
        FileNotFoundError: there is no config.json, or no weights, or a shard is missing.
        ValueError: files contradict their index, or each other.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{config_file} does not exist: name a folder in Hugging Face's layout."
        )
    config = json.loads(config_file.read_text())
    return HuggingFaceFolder(path, config, _tensors(path))


def _tensors(path: Path) -> dict[str, Stored]:
    for index, read in ((SAFETENSORS_INDEX, safetensors_file), (BIN_INDEX, bin_file)):
        if (path / index).is_file():
            return _indexed(path, index, read)
    for pattern, read in (("*.safetensors", safetensors_file), ("pytorch_model*.bin", bin_file)):
        files = sorted(path.glob(pattern))
        if files:
            return _merged({file: read(file) for file in files})
    raise FileNotFoundError(f"{path} holds neither *.safetensors nor pytorch_model*.bin files.")


def _indexed(path: Path, index: str, read: Any) -> dict[str, Stored]:
    weight_map: dict[str, str] = json.loads((path / index).read_text())["weight_map"]
    files = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{path / index} names '{name}', which is not a file of its folder.")
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} is missing, and {index} lists it.")
        files[path / name] = read(path / name)
    tensors = _merged(files)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise ValueError(f"{path / index} places {name} in {file}, which does not hold it.")
    return tensors


def _merged(files: dict[Path, dict[str, Stored]]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file, stored in files.items():
        twice = sorted(set(tensors) & set(stored))
        if twice:
            raise ValueError(f"{file} holds {twice[0]}, as does {tensors[twice[0]].path}.")
        tensors |= stored
    return tensors

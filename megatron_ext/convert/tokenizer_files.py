"""Tokenizer and generation files beside exported weights, so that transformers finds them."""

import json
import logging
from pathlib import Path
from typing import Any

from megatron_ext.atomic import write_bytes, write_text
from megatron_ext.convert.described import ASSET
from megatron_ext.convert.huggingface import ASSETS

logger = logging.getLogger(__name__)


def write(
    target: Path, checkpoint: Path, tokenizer: Path | None, ids: dict[str, Any]
) -> dict[str, Any]:
    """Put the files there; bos, eos and pad ids, from the tokenizer where ``ids`` is empty.

    Args:
        target: the folder being written.
        checkpoint: may carry files of the release it was imported from.
        tokenizer: a file, or a folder of files, that replaces those.
        ids: what is known of the special tokens already.

    Raises:
        FileNotFoundError: ``tokenizer`` holds no tokenizer.
    """
    for name in ASSETS:
        if tokenizer is None and (checkpoint / (ASSET + name)).is_file():
            write_bytes(target / name, (checkpoint / (ASSET + name)).read_bytes())
    if tokenizer is not None:
        _copy(tokenizer, target)
    pieces = target / "tokenizer.model"
    if tokenizer and pieces.is_file() and not (target / "tokenizer_config.json").is_file():
        ids = _sentencepiece(pieces, target, ids)
    if not (target / "generation_config.json").is_file():
        generation = {**ids, "_from_model_config": True}
        write_text(target / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    return ids


def _copy(tokenizer: Path, target: Path) -> None:
    files = [tokenizer] if tokenizer.is_file() else [tokenizer / name for name in ASSETS]
    files = [file for file in files if file.is_file()]
    if not files:
        raise FileNotFoundError(f"--tokenizer {tokenizer}: no tokenizer file is there.")
    for file in files:
        name = "tokenizer.model" if file.suffix == ".model" else file.name
        write_bytes(target / name, file.read_bytes())


def _sentencepiece(pieces: Path, target: Path, ids: dict[str, Any]) -> dict[str, Any]:
    """Describe a bare SentencePiece model as the Llama tokenizer it is, nothing added to text.

    Only for models that take text as it is (identity, no prefix, no joined spaces): of others
    transformers' class makes other tokens, so they are left without a description.
    """
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    data = pieces.read_bytes()
    try:
        model = SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise ValueError(f"--tokenizer: {pieces.name} is no SentencePiece model.") from error
    proto = ModelProto()
    proto.ParseFromString(data)
    spec = proto.normalizer_spec
    named = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    ids = ids or {f"{name}_token_id": i for name, i in named.items() if i >= 0}
    if spec.name != "identity" or spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        logger.warning(
            "the tokenizer normalises text (%s); transformers' AutoTokenizer is not told of it: "
            "use SentencePiece itself",
            spec.name,
        )
        return ids
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "unk_token": model.id_to_piece(model.unk_id()),
    }
    config |= {f"{n}_token": model.id_to_piece(i) for n, i in named.items() if i >= 0}
    write_text(target / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    return ids

"""Text to compare models on: short passages of our own in Chinese, English and code, or a file."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PASSAGES = {
    "zh": (
        "河水从山里流出来，经过三个村子，最后汇入大江。老人说，五十年前这里还没有桥，"
        "过河要等渡船；冬天水浅的时候，孩子们踩着石头就能走过去。现在桥上每天有两千多辆车经过，"
        "可是夏天傍晚，人们还是喜欢坐在岸边，听水声，看灯一盏一盏亮起来。"
    ),
    "en": (
        "The survey began at the lower gate, where the wall is oldest, and moved uphill for "
        "eleven days. Every stone was numbered, drawn and photographed before anything was "
        "moved. By the second week it was clear that the tower had been rebuilt at least twice: "
        "the mortar changes colour at a height of about four metres, and again near the roof."
    ),
    "code": (
        "def running_mean(values, width):\n"
        '    """Mean of each window of `width` values."""\n'
        "    total, means = sum(values[:width]), []\n"
        "    for i in range(width, len(values) + 1):\n"
        "        means.append(total / width)\n"
        "        if i < len(values):\n"
        "            total += values[i] - values[i - width]\n"
        "    return means\n"
    ),
}


def token_ids(
    folder: Path, files: list[Path], *, vocab_size: int, tokens: int
) -> tuple[dict[str, "Tensor"], str]:
    """Ids [1, S] of each passage (or file), and of random tokens; and how they were made.

    Args:
        folder: holds ``tokenizer.json`` or ``tokenizer.model``; without, bytes stand for tokens.
        files: UTF-8 texts to use instead of our own passages.
        vocab_size: random tokens are below it.
        tokens: longest text.
    """
    import torch

    texts = {file.name: file.read_text() for file in files} or PASSAGES
    encode, how = _encoder(folder, vocab_size)
    ids = {name: encode(text)[:tokens] for name, text in texts.items()}
    short = [name for name in ids if len(ids[name]) < 2]
    if short:
        raise ValueError(f"{short[0]} is {len(ids[short[0]])} tokens long: at least 2 are needed.")
    found = {name: torch.tensor([row]) for name, row in ids.items()}
    seeded = torch.Generator().manual_seed(1234)
    found["random"] = torch.randint(0, vocab_size, (1, tokens), generator=seeded)
    return found, how


def _encoder(folder: Path, vocab_size: int) -> tuple[Callable[[str], list[int]], str]:
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda text: fast.encode(text, add_special_tokens=False).ids, "tokenizer.json"
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return pieces.encode, "tokenizer.model"
    return lambda text: [b % vocab_size for b in text.encode()], "no tokenizer: bytes as token ids"

"""Preparation against Megatron-LM's way: a pool of workers, one tokenizer call a document.

    python -m tools.bench.prepare [--text corpus/train/*.jsonl] [--tokenizer FILE]

The peer is Megatron-LM's tools/preprocess_data.py as far as its cost goes: lines through a pool's
imap in chunks of 32, json, one Hugging Face call a document, lists of ids back through a pipe,
IndexedDatasetBuilder.add_document. Both sides' .bin and .idx must be equal. Imports and loading of
the tokenizer are in neither figure. Without --tokenizer one of each kind is trained on the text.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

PEER: dict = {}
"""What the peer's forked workers find: its tokenizer and whether documents end by a token."""


def main() -> int:
    """Compare on every tokenizer."""
    parser = argparse.ArgumentParser(prog="tools.bench.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="JSONL files")
    parser.add_argument("--tokenizer", type=Path, nargs="*", default=[])
    parser.add_argument("--megabytes", type=float, default=4.0, help="of text, drawn evenly")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a pool of processes is the parallelism here
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        size = write_text(text, options.text, options.megabytes)
        for path in options.tokenizer or trained(text, Path(folder)):
            compare(path, text, size, Path(folder), options)
    return 0


def write_text(path: Path, inputs: list[Path], megabytes: float) -> float:
    """One JSONL of about ``megabytes``, the same share of each input; MB of text in it."""
    from megatron_ext.data.corpus import shipped

    texts, size = [], 0
    for source in inputs:
        held = 0
        for line in source.read_text().splitlines():
            texts.append(json.loads(line)["text"])
            held += len(texts[-1].encode())
            if held >= megabytes * 1e6 / len(inputs):
                break
        size += held
    if not inputs:
        own = [document.text for document in shipped.documents()]
        once = sum(len(text.encode()) for text in own)
        texts = [f"{i}. {text}" for i in range(int(megabytes * 1e6 / once)) for text in own]
        size = sum(len(text.encode()) for text in texts)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    print(f"{size / 1e6:.1f} MB of text in {len(texts)} documents")
    return size / 1e6


def trained(text: Path, folder: Path) -> list[Path]:
    """A SentencePiece model by Yi's rules and a byte-level tokenizer.json, 8,192 pieces each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from megatron_ext.data.tokenizer_training import train_tokenizer

    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    train_tokenizer(texts, folder / "yi_rules.model", vocab_size=8192)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "byte_level.json"))
    return [folder / "yi_rules.model", folder / "byte_level.json"]


def compare(path: Path, text: Path, size: float, folder: Path, options: argparse.Namespace) -> None:
    """Both sides on one tokenizer, by the library and by the fast engine where there is one."""
    from megatron_ext.data.documents import Reading
    from megatron_ext.data.fast_encoder import fastest
    from megatron_ext.data.prepare import Preparation, prepare_corpus
    from megatron_ext.data.tokenizer import load_tokenizer
    from tools.bench.pairs import interleave, report

    library = load_tokenizer(path)
    calls = peer_calls(path)
    fast = fastest(library)
    engines = {"library": library} | ({} if fast is library else {"GigaToken": fast})
    for engine, tokenizer in engines.items():
        for peer, call in calls.items():

            def ours(tokenizer=tokenizer):  # type: ignore[no-untyped-def]
                how = Preparation(tokenizer=tokenizer, reading=Reading(), workers=options.workers)
                prepare_corpus([text], folder / "ours", how)

            def theirs(call=call):  # type: ignore[no-untyped-def]
                PEER.update(call=call, eod=library.eod_id)
                megatron_way(text, folder / "theirs", library.vocab_size, options.workers)

            pairs = interleave(ours, theirs, pairs=options.pairs)
            same = all(
                (folder / f"ours.{end}").read_bytes() == (folder / f"theirs.{end}").read_bytes()
                for end in ("bin", "idx")
            )
            report(
                f"prepare, {path.name}",
                pairs,
                ours=f"ours by {engine}, {size / pairs.median('ours'):.1f} MB/CPU-s",
                peer=f"{peer}, {size / pairs.median('peer'):.2f} MB/CPU-s",
                bar=f"at most 0.2; .bin and .idx {'equal' if same else 'DIFFER'}",
            )


def peer_calls(path: Path) -> dict:
    """The peer's call for one document: Hugging Face, and for SentencePiece also its own."""
    from tokenizers import Tokenizer

    if path.suffix == ".json":
        tokenizer = Tokenizer.from_file(str(path))
        return {
            "pool of HF calls": lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        }
    if path.suffix == ".model":
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=str(path))
        converted = hf_from_sentencepiece(model)
        return {
            "pool of HF calls": lambda text: converted.encode(text, add_special_tokens=False).ids,
            "pool of SentencePiece calls": model.EncodeAsIds,
        }
    from megatron_ext.data.tokenizer import load_tokenizer

    return {"pool of tiktoken calls": load_tokenizer(path).encode}


def hf_from_sentencepiece(model):  # type: ignore[no-untyped-def]
    """The model as Hugging Face runs Llama's: merges found from the pieces, bytes as fallback."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = {model.IdToPiece(i): i for i in range(model.vocab_size())}
    merges = []
    for piece, number in pieces.items():
        if not (model.IsByte(number) or model.IsControl(number) or model.IsUnknown(number)):
            splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
            known = [(a, b) for a, b in splits if a in pieces and b in pieces]
            known.sort(key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
            merges += [(-model.GetScore(number), index, pair) for index, pair in enumerate(known)]
    merges.sort(key=lambda entry: entry[:2])
    tokenizer = Tokenizer(
        models.BPE(
            vocab=pieces,
            merges=[pair for _, _, pair in merges],
            unk_token=model.IdToPiece(model.unk_id()),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback()]
    )
    names = [model.IdToPiece(i) for i in range(model.vocab_size()) if model.IsControl(i)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return tokenizer


def _encode_line(line: str) -> tuple[list[int], list[int], int]:
    ids = PEER["call"](json.loads(line)["text"])
    return [*ids, PEER["eod"]], [len(ids) + 1], len(line)


def megatron_way(text: Path, prefix: Path, vocab_size: int, workers: int) -> None:
    """tools/preprocess_data.py of Megatron-LM, its main loop."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    with open(text, encoding="utf-8") as file:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for ids, lengths, _ in pool.imap(_encode_line, file, 32):
                builder.add_document(ids, lengths)
            pool.close()
            pool.join()
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    sys.exit(main())

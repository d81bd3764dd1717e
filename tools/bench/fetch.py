"""Fetching samples against megatron-core's GPTDataset and a plain slice of the memory map.

    python -m tools.bench.fetch [--documents 100000] [--samples 2000] [--seq-length 4096]

The same corpus, lognormal documents of median 400 tokens, warm page cache, samples of one source in
random order. Ours reads through a phase's blend, as training does.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path


def main() -> int:
    """Compare with both."""
    parser = argparse.ArgumentParser(prog="tools.bench.fetch", description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options)
    return 0


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Write the corpus, open it in three ways, fetch the same number of samples from each."""
    import numpy as np
    import torch

    from megatron_ext.data.batches import PhaseBatches
    from megatron_ext.data.indexed import IndexedCorpus
    from megatron_ext.data.writer import CorpusWriter
    from megatron_ext.train.config import PhaseConfig
    from tools.bench.pairs import interleave, report

    torch.set_num_threads(1)
    random, size = np.random.default_rng(0), options.seq_length
    lengths = np.clip(random.lognormal(np.log(400), 1.0, options.documents), 1, 10**6).astype(int)
    with CorpusWriter(folder / "c", dtype=np.uint16) as writer:
        writer.add_documents(random.integers(0, 60000, int(lengths.sum())), lengths)
    corpus = IndexedCorpus(folder / "c")
    available = corpus.num_tokens // size - 1
    numbers = random.integers(0, available, options.samples).tolist()
    phase = PhaseConfig(tokens=available * size, seq_length=size, mixture={"c": 1.0})
    batches = PhaseBatches(phase, {"c": corpus}, {}, seed=1)
    theirs = gpt_dataset(folder, size, available)

    def ours():  # type: ignore[no-untyped-def]
        for k in numbers:
            batches.micro_batch([k])

    def tokens_only():  # type: ignore[no-untyped-def]
        out = np.empty(size + 1, dtype=np.int64)
        for k in numbers:
            batches.read(k, out)

    def peer():  # type: ignore[no-untyped-def]
        for k in numbers:
            theirs[k % len(theirs)]

    def plain():  # type: ignore[no-untyped-def]
        for k in numbers:
            torch.from_numpy(corpus.tokens[k * size : (k + 1) * size + 1].astype(np.int64))

    def cost(pairs, side):  # type: ignore[no-untyped-def]
        seconds = pairs.median(side)
        per_million = seconds / (options.samples * size / 1e6)
        return f"{1e6 * seconds / options.samples:.1f} us, {per_million:.4f} CPU-s per M tokens"

    for call, name in ((ours, "a micro-batch of one"), (tokens_only, "its tokens alone")):
        for other, its_name, bar in (
            (peer, "GPTDataset", "at most 0.2"),
            (plain, "slice to int64 tensor", "at most 3"),
        ):
            pairs = interleave(call, other, pairs=options.pairs)
            report(
                f"fetch of {size} tokens: {name} against {its_name}",
                pairs,
                ours=f"ours, {cost(pairs, 'ours')}",
                peer=f"{its_name}, {cost(pairs, 'peer')}",
                bar=bar,
            )


class Vocabulary:
    """The part of a tokenizer that GPTDataset asks for."""

    vocab_size, eod, pad = 60000, 0, 0

    def __init__(self) -> None:
        self.unique_identifiers = OrderedDict(name="bench")


def gpt_dataset(folder: Path, size: int, samples: int):  # type: ignore[no-untyped-def]
    """megatron-core's own, as pretraining sets it: no resets, no mask made, indices cached."""
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    if not torch.distributed.is_initialized():
        store = torch.distributed.FileStore(str(folder / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=size,
        blend=([str(folder / "c")], None),
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=Vocabulary(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config)
    return builder.build()[0]


if __name__ == "__main__":
    sys.exit(main())

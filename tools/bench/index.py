"""Index building against megatron-core's helpers: samples, shuffles and blends, equal arrays.

    python -m tools.bench.index [--documents 10000000] [--samples 1000000]

megatron-core's compiled helpers are loaded alone, without importing megatron. Ours are numpy and,
for the blend, numba; compiling is in neither figure.
"""

import argparse
import importlib.util
import os
import resource
import sys
from pathlib import Path


def megatron_helpers():  # type: ignore[no-untyped-def]
    """megatron.core.datasets.helpers_cpp, without the 7 CPU-seconds of importing megatron."""
    found = importlib.util.find_spec("megatron")
    assert found is not None and found.submodule_search_locations is not None
    folder = Path(next(iter(found.submodule_search_locations))) / "core" / "datasets"
    (file,) = folder.glob("helpers_cpp*.so")
    spec = importlib.util.spec_from_file_location("helpers_cpp", file)
    assert spec is not None and spec.loader is not None
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    return helpers


def main() -> int:
    """Blend at several numbers of sources, then one epoch of many documents."""
    parser = argparse.ArgumentParser(prog="tools.bench.index", description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    helpers = megatron_helpers()
    for count in (2, 8, 128, 512):
        blend(helpers, count, options)
    one_epoch(helpers, options)
    return 0


def blend(helpers, count: int, options: argparse.Namespace) -> None:  # type: ignore[no-untyped-def]
    """Which source gives each sample, for shares in round figures and for sizes of corpora."""
    import numpy as np

    from megatron_ext.data.blend import BLOCK, Blend
    from tools.bench.pairs import interleave, report

    random = np.random.default_rng(0)
    blocks = -(-options.samples // BLOCK)
    for kind, raw in (
        ("round shares", random.integers(1, 20, count)),
        ("shares by size", random.lognormal(0, 1, count)),
    ):
        shares = raw / raw.sum()
        theirs = np.zeros(options.samples, dtype=np.int16)
        within = np.zeros(options.samples, dtype=np.int64)
        ours = np.zeros(blocks * BLOCK, dtype=np.int16)
        before = np.zeros(blocks * BLOCK, dtype=np.int64)

        def our_call(shares=shares, ours=ours, before=before):  # type: ignore[no-untyped-def]
            made = Blend(shares)
            for number in range(blocks):
                part = slice(number * BLOCK, (number + 1) * BLOCK)
                ours[part], before[part] = made.block(number)

        def their_call(shares=shares, theirs=theirs, within=within):  # type: ignore[no-untyped-def]
            helpers.build_blending_indices(theirs, within, shares, count, len(theirs), False)

        pairs = interleave(our_call, their_call, pairs=options.pairs)
        equal = np.array_equal(ours[: len(theirs)], theirs)
        equal &= np.array_equal(before[: len(theirs)], within)
        each = 1e9 / options.samples
        bar = "at most 0.1" if count == 512 else "at most 1.0" if count == 2 else "none stated"
        report(
            f"blend of {count} sources, {options.samples:,} samples, {kind}",
            pairs,
            ours=f"ours, {pairs.median('ours') * each:.1f} ns a sample",
            peer=f"build_blending_indices, {pairs.median('peer') * each:.1f} ns",
            bar=f"{bar}; both arrays {'equal' if equal else 'DIFFER'}",
        )


def one_epoch(helpers, options: argparse.Namespace) -> None:  # type: ignore[no-untyped-def]
    """Shuffle the documents of one source and find every sample in them.

    megatron-core shuffles documents and samples and writes a sample index. Ours shuffles documents
    and sums their lengths; a sample is found by its offset, so neither index is needed. That every
    sample begins at the same document and token is checked on a common document order.
    """
    import numpy as np

    from megatron_ext.data.epoch import document_order, in_order
    from tools.bench.pairs import interleave, report

    size = 4096
    drawn = np.random.default_rng(0).lognormal(np.log(400), 1.0, options.documents)
    lengths = np.clip(drawn, 1, 10**6).astype(np.int32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    total = int(lengths.sum(dtype=np.int64))

    def ours():  # type: ignore[no-untyped-def]
        return in_order(document_order(options.documents, seed=(1, 2, 3)), starts, lengths)

    def theirs():  # type: ignore[no-untyped-def]
        state = np.random.RandomState(1)
        order = np.arange(options.documents, dtype=np.int32)
        state.shuffle(order)
        samples = helpers.build_sample_idx_int32(lengths, order, size, 1, total, True, 1)
        shuffle = np.arange(len(samples) - 1, dtype=np.uint32)
        state.shuffle(shuffle)
        return order, samples, shuffle

    pairs = interleave(ours, theirs, pairs=options.pairs, warmup=0)
    order, samples, _ = theirs()
    ends = np.cumsum(lengths[order], dtype=np.int64)
    offsets = np.arange(len(samples) - 1, dtype=np.int64) * size
    documents = ends.searchsorted(offsets, "right")
    begins = offsets - (ends[documents] - lengths[order][documents])
    equal = np.array_equal(np.stack([documents, begins], axis=1), samples[:-1])
    report(
        f"one epoch of {options.documents:,} documents, {total / 1e9:.1f} G tokens",
        pairs,
        ours="ours: shuffled starts and ends",
        peer="document, sample and shuffle index",
        bar=f"at most 1.0; samples {'equal' if equal else 'DIFFER'}",
    )
    print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    sys.exit(main())

"""Best-fit packing against TRL's, on lognormal lengths.

    python -m tools.bench.packing [--sizes 100000 1000000 10000000]

The peer is the assignment loop of trl.data_utils._pack_bfd of TRL 1.16 (Apache-2.0), reproduced
without its Arrow tables, whose cost is not counted against it.
"""

import argparse
import resource
import sys
from collections import defaultdict, deque


class SegmentTree:
    """TRL's: finds the smallest value present that is at least the one asked for."""

    def __init__(self, maxval: int) -> None:
        self.tree_size = 1 << (maxval - 1).bit_length()
        self.tree = [0] * (2 * self.tree_size)

    def set(self, position: int, value: int) -> None:
        """TRL's ``add`` and ``remove`` in one."""
        i = self.tree_size + position - 1
        self.tree[i] = value
        while i > 1:
            i >>= 1
            left, right = self.tree[i << 1], self.tree[(i << 1) + 1]
            self.tree[i] = left if left >= right else right

    def search(self, value: int) -> int:
        """The smallest value present that is at least ``value``."""
        i = 1
        while i < self.tree_size:
            i = i << 1 if self.tree[i << 1] >= value else (i << 1) + 1
        return self.tree[i]


def trl_bins(lengths, capacity: int) -> int:  # type: ignore[no-untyped-def]
    """TRL's greedy loop over sequences, longest first; how many bins it makes."""
    order = (-lengths).argsort(kind="stable")
    tree = SegmentTree(capacity)
    tree.set(capacity, capacity)
    space_to_bin: dict[int, deque] = defaultdict(deque)
    bins: list[dict] = []
    for length, index in zip(lengths[order], order, strict=True):
        space = tree.search(length)
        if space < capacity:
            chosen = space_to_bin[space].popleft()
        else:
            chosen = {"ids": [], "length": 0}
            bins.append(chosen)
        chosen["ids"].append(index)
        chosen["length"] += length
        if space < capacity and not space_to_bin[space]:
            tree.set(space, 0)
        space = space - length
        space_to_bin[space].append(chosen)
        if space > 0:
            tree.set(space, space)
    return len(bins)


def main() -> int:
    """Compare at every size; the peer is left out where it would take minutes."""
    parser = argparse.ArgumentParser(prog="tools.bench.packing", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[10**5, 10**6, 10**7])
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--peer-up-to", type=int, default=10**6, help="sizes the peer is run at")
    options = parser.parse_args()
    import numpy as np

    from megatron_ext.data.packing import best_fit
    from tools.bench.pairs import interleave, measure, report

    for size in options.sizes:
        drawn = np.random.default_rng(0).lognormal(np.log(400), 1.0, size)
        lengths = np.clip(drawn.astype(np.int64), 1, options.capacity)
        bound = -(-int(lengths.sum()) // options.capacity)
        found: dict[str, int] = {}

        def ours(lengths=lengths, found=found):  # type: ignore[no-untyped-def]
            found["ours"] = best_fit(lengths, capacity=options.capacity).num_bins

        def theirs(lengths=lengths, found=found):  # type: ignore[no-untyped-def]
            found["theirs"] = trl_bins(lengths, options.capacity)

        if size <= options.peer_up_to:
            # The larger size takes the peer minutes on a busy machine: fewer pairs there.
            pairs = interleave(
                ours, theirs, pairs=options.pairs if size <= 10**5 else 3, warmup=size <= 10**5
            )
            report(
                f"packing, {size:,} sequences into {options.capacity}",
                pairs,
                ours=f"ours, {size / pairs.median('ours') / 1e6:.2f} M sequences/CPU-s",
                peer=f"TRL, {size / pairs.median('peer') / 1e6:.3f} M sequences/CPU-s",
                bar=f"at most 0.02; faster {1 / pairs.ratio():.0f} times",
            )
        else:
            seconds = sorted(measure(ours).cpu for _ in range(options.pairs))[options.pairs // 2]
            print(f"packing, {size:,} sequences: ours {size / seconds / 1e6:.2f} M/CPU-s")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        allowed = int(lengths.sum()) // 10**6
        print(
            f"  bins over the bound {bound:,}: {found['ours'] - bound} of {allowed} allowed"
            f"{', TRL ' + str(found['theirs'] - bound) if 'theirs' in found else ''}; "
            f"peak memory so far {peak:.2f} GiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

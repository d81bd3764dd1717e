"""Builds the document orders of a run's sources ahead, where no GPU waits for them.

    python -m tools.build_indices [--epochs 2] recipe=NAME data.index_cache=FOLDER ...

Takes launch.train's overrides. Ranks that find the files verify checksums instead of building.
"""

import argparse
import sys


def main() -> int:
    """Compose the run, open its sources, build and keep each epoch that is not there yet."""
    parser = argparse.ArgumentParser(
        prog="tools.build_indices", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("overrides", nargs="+", help="as for launch.train; data.index_cache too")
    parser.add_argument("--epochs", type=int, default=1, help="of each source, from the first on")
    options = parser.parse_args()
    if options.epochs < 1:
        raise ValueError(f"--epochs={options.epochs} must be 1 or more.")
    from launch.compose import compose

    job = compose(options.overrides)
    if not job.data.index_cache:
        raise ValueError("data.index_cache is empty: name the folder to keep the orders in.")
    build(job, options.epochs)
    return 0


def build(job, epochs: int) -> None:  # type: ignore[no-untyped-def]
    """Build and keep ``epochs`` epochs of every source, with a progress bar."""
    from tqdm import tqdm

    from megatron_ext.data.indexed import IndexedCorpus
    from megatron_ext.data.stream import TokenStream

    wanted = [(name, number) for name in job.data.sources for number in range(epochs)]
    for name, number in tqdm(wanted, desc="epochs"):
        key = f"data.sources.{name}.path"
        corpus = IndexedCorpus(job.data.sources[name].path, key=key)
        corpus.check()
        TokenStream(corpus, seed=job.seed, name=name, cache=job.data.index_cache).epoch(number)


if __name__ == "__main__":
    from launch.cli import refusing

    sys.exit(refusing(main))

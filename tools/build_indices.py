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
    options = parser.parse_intermixed_args()
    if options.epochs < 1:
        raise ValueError(f"--epochs={options.epochs} must be 1 or more.")
    from launch.compose import compose

    job = compose(options.overrides)
    if not job.data.index_cache:
        raise ValueError("data.index_cache is empty: name the folder to keep the orders in.")
    build(job, options.epochs)
    return 0


def build(job, epochs: int) -> None:  # type: ignore[no-untyped-def]
    """Build and keep ``epochs`` epochs of every source, with a progress bar.

    Raises:
        ValueError: a source cannot be read; then nothing is built.
    """
    from tqdm import tqdm

    from megatron_ext.data.indexed import IndexedCorpus
    from megatron_ext.data.stream import TokenStream

    opened = {}
    for name, source in job.data.sources.items():
        if not source.path:
            raise ValueError(
                f"data.sources.{name}.path is empty: name the source's prepared .bin and .idx."
            )
        opened[name] = IndexedCorpus(source.path, key=f"data.sources.{name}.path")
        opened[name].check()
    with tqdm(total=len(opened) * epochs, desc="epochs") as bar:
        for name, corpus in opened.items():
            stream = TokenStream(corpus, seed=job.seed, name=name, cache=job.data.index_cache)
            for number in range(epochs):
                stream.epoch(number)
                bar.update()


if __name__ == "__main__":
    from launch.cli import refusing

    sys.exit(refusing(main))

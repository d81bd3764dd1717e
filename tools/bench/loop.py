"""What the trainer adds to a step: Trainer.step with every callback, over the bare module.

    python -m tools.bench.loop

Both sides run the same module, micro-batches and optimizer in one process, in turn: once through
the trainer (metrics, callbacks, data, schedule, learning rate), once as plain forward, backward
and optimizer step.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.cli import refusing
from tools.bench.pairs import Pairs, interleave, report

SHAPES = {
    "100 ms": ["model.num_layers=6", "model.hidden_size=256", "model.ffn_hidden_size=704"],
    "5 ms": ["model.num_layers=1", "model.hidden_size=64", "model.ffn_hidden_size=176"],
}
LENGTH = {"100 ms": 64, "5 ms": 16}


def main(argv: list[str] | None = None) -> int:
    """Print ratio and milliseconds added at two step sizes."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="steps in one sample")
    args = parser.parse_args(argv)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    with tempfile.TemporaryDirectory() as folder:
        for name in SHAPES:
            _shape(name, Path(folder), args)
    return 0


def _shape(name: str, folder: Path, args: argparse.Namespace) -> None:
    from megatron_ext.devices import device

    device.start()
    from megatron_ext.parallel import groups
    from megatron_ext.parallel.env import Env
    from megatron_ext.train.build import build_trainer

    job = _job(name, folder)
    env = Env.read(os.environ)
    meeting = f"file://{folder}/meeting-{name.replace(' ', '')}"
    process_groups = groups.start(job.parallel, env, seed=1, init_method=meeting)
    trainer = build_trainer(job, env=env, groups=process_groups)
    trainer.enter_phase(new=True)
    for callback in trainer.callbacks:
        callback.before_training(trainer)
    bare = _bare(trainer, args.steps)

    def ours() -> None:
        for _ in range(args.steps):
            for callback in trainer.callbacks:
                callback.before_step(trainer)
            metrics = trainer.step()
            for callback in trainer.callbacks:
                callback.after_step(trainer, metrics)

    pairs = interleave(ours, bare, pairs=args.pairs, warmup=2)
    report(
        f"trainer step over the bare module, {name} step",
        pairs,
        ours=f"Trainer.step and callbacks, {args.steps} steps",
        peer="forward, backward, optimizer.step",
        bar="1.02 at 100 ms, at most 1 ms added at 5 ms",
    )
    print(f"  added per step: {1000 * _added(pairs) / args.steps:.3f} CPU-ms")
    groups.stop()


def _added(pairs: Pairs) -> float:
    return pairs.median("ours") - pairs.median("peer")


def _job(name: str, folder: Path) -> Any:
    import numpy as np

    from launch.compose import compose
    from megatron_ext.data.writer import CorpusWriter

    length = LENGTH[name]
    text = folder / f"text{length}"
    tokens = np.random.default_rng(1).integers(0, 509, 2**21).astype(np.uint16)
    with CorpusWriter(text, dtype=np.uint16) as corpus:
        corpus.add_documents(tokens, np.full(2**11, 2**10))
    return compose(
        [
            "model=index_tiny",
            *SHAPES[name],
            f"name=loop-{length}",
            f"run_dir={folder}/{length}",
            "precision=fp32",
            f"data.sources.text.path={text}",
            "data.sources.text.max_epochs=1e6",
            "batch.global_batch_size=4",
            "batch.micro_batch_size=4",
            f"batch.seq_length={length}",
            "phases=[{tokens: 1000000000}]",
        ]
    )


def _bare(trainer: Any, steps: int) -> Any:
    """The same work without a trainer around it, on batches that are already there."""
    model, optimizer = trainer.model[0], trainer.optimizer
    batch = next(trainer.feed.step(trainer.phase, trainer.state, global_batch_size=4)())

    def run() -> None:
        for _ in range(steps):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            losses = model(
                input_ids=batch["tokens"],
                position_ids=batch["position_ids"],
                attention_mask=None,
                labels=batch["labels"],
            )
            losses.mean().backward()
            model.finish_grad_sync()
            optimizer.step()

    return run


if __name__ == "__main__":
    sys.exit(refusing(main))

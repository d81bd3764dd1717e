"""What being watched costs a step: everything that looks on, over the step it looks at.

    python -m tools.bench.watching

Two ranks of a 100 ms step on gloo. On one side the hooks of a watched rank (signs of life, own time
and its comparison between ranks, counting of collectives), without any step between them; on the
other the same number of steps without them; in turn. Beside them the parents that watch over the
ranks, in CPU seconds for each second of the run; and how long it takes to name a stopped rank.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cli import refusing
from tools.bench.pairs import interleave, report

if TYPE_CHECKING:
    from megatron_ext.resilience.watcher import Watcher
    from megatron_ext.testing import Ended

SHAPE = ["model=index_tiny", "model.num_layers=6", "model.hidden_size=256"]
SHAPE += ["model.ffn_hidden_size=704", "precision=fp32", "data.synthetic=true"]
SHAPE += ["batch.seq_length=64", "batch.global_batch_size=8", "batch.micro_batch_size=4"]
SHAPE += ["phases=[{tokens: 1000000000}]", "logging.tensorboard=false"]
RANKS = 2
BAR = "0.005 of a step"


def main(argv: list[str] | None = None) -> int:
    """Print the hooks' ratio and the parents' share of a core."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.watching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="steps in one sample")
    parser.add_argument("--seconds", type=float, default=30.0, help="time to watch the parents")
    args = parser.parse_args(argv)
    from megatron_ext.testing import run_on_ranks

    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(_hooks, folder, args.pairs, args.steps, world_size=RANKS, timeout=600.0)
        _parents(Path(folder), args.seconds)
        _hang(Path(folder))
    return 0


def _hooks(folder: str, pairs: int, steps: int) -> None:
    """On every rank; rank 0 prints."""
    import torch

    from launch.compose import compose
    from megatron_ext.parallel import groups
    from megatron_ext.parallel.env import Env
    from megatron_ext.parallel.waiting import waits
    from megatron_ext.resilience.heartbeat import Heartbeat
    from megatron_ext.testing import meeting
    from megatron_ext.train.build import build_trainer
    from megatron_ext.train.callbacks.signs_of_life import SignsOfLife
    from megatron_ext.train.callbacks.stragglers import Stragglers

    job = compose([*SHAPE, "name=watching", f"run_dir={folder}/run"])
    Path(job.run_dir).mkdir(exist_ok=True)
    env = Env.read(os.environ)
    process_groups = groups.start(job.parallel, env, seed=1, init_method=meeting())
    trainer = build_trainer(job, env=env, groups=process_groups)
    trainer.enter_phase(new=True)
    watching = [Stragglers(job.watch), SignsOfLife(Heartbeat())]
    for callback in watching:
        callback.before_training(trainer)
    metrics: dict[str, Any] = trainer.step()

    def hooks() -> None:
        for _ in range(steps):
            for callback in watching:
                callback.before_step(trainer)
            for callback in watching:
                callback.after_step(trainer, metrics)
            trainer.state.step += 1

    def plain() -> None:
        for _ in range(steps):
            trainer.step()

    found = interleave(hooks, plain, pairs=pairs)
    if env.rank == 0:
        names = {"ours": f"hooks of {steps} steps", "peer": f"{steps} steps without them"}
        report("watching a rank, over its steps", found, **names, bar=BAR)
    before = waits().calls
    trainer.step()
    calls = waits().calls - before
    done = torch.distributed.all_reduce(torch.ones(1), async_op=True)
    done.wait()
    if env.rank == 0:
        began = time.perf_counter()
        for _ in range(10_000):
            done.wait()
        each = (time.perf_counter() - began) / 10_000
        share = calls * each * steps / found.median("peer", "wall")
        print(f"  counting {calls} collectives at most {share:.6f} of a step ({1e6 * each:.1f} us)")
    trainer.stop.remove()


def _watched(run_dir: Path, task: "Callable[[Watcher, int], int]") -> "list[Ended]":
    """Two ranks under watchers with the usual deadlines."""
    from megatron_ext.resilience.config import WatchConfig
    from megatron_ext.testing import run_under_watchers

    folder = run_dir / "attempts" / "a"
    folder.mkdir(parents=True)
    return run_under_watchers(folder, task, world_size=RANKS, watch=WatchConfig())


def _parents(folder: Path, seconds: float) -> None:
    """The watchers of ranks that do nothing, beside the time that passes.

    A run of a second is taken off one that is longer by ``seconds``: forks are no watching.
    """

    def idle(stay: float) -> "list[Ended]":
        def task(_watcher: "Watcher", _port: int) -> int:
            time.sleep(stay)
            return 0

        return _watched(folder / f"idle{stay:g}", task)

    short, long = idle(1.0), idle(1.0 + seconds)
    for rank, ((_, first), (_, whole)) in enumerate(zip(short, long, strict=True)):
        what = "presides" if rank == 0 else "watches"
        print(
            f"  parent of rank {rank} ({what}): {whole - first:.3f} CPU-s in {seconds:.1f} s, "
            f"{(whole - first) / seconds:.4f} of a core; bar: {BAR}"
        )


def _hang(folder: Path) -> None:
    """From the last sign of life of a stopped rank to the report that names it."""

    def steps(watcher: "Watcher", _port: int) -> int:
        beat, rank = watcher.heartbeat, watcher.seat.rank
        first = not (folder / "struck").exists()
        beat.enter("between")
        for step in range(30):
            beat.enter("step")
            if step == 20 and first and rank:
                usual = beat.read().p99_seconds
                (folder / "struck").write_text(f"{time.time()} {usual}")
                os.kill(os.getpid(), signal.SIGSTOP)
            elif step == 20 and first:
                time.sleep(1000)  # as in a collective that the other rank never joins
            time.sleep(0.1)
            beat.step_done(step + 1, regime=0)
        return 0

    _watched(folder / "hang", steps)
    event = json.loads((folder / "hang" / "attempts" / "a" / "event-0.json").read_text())
    struck, usual = map(float, (folder / "struck").read_text().split())
    print(
        f"  named {event['time'] - struck:.1f} s after its last sign, stacks of all ranks written; "
        f"deadline 3 x {usual:.3f} + 5 = {3 * usual + 5:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(refusing(main))

"""What a checkpoint costs: the stall of a background save, and all of a plain one.

    python -m tools.bench.checkpoint

One rank with a model of about 30 M parameters and its Adam state (fp32: about 0.4 GB).

- stall: the seconds for which training stops when a save starts in the background, over copying
  the same bytes from memory to memory;
- save: bytes per second of a whole plain save (tensors, hashes, fsync, seal, rename), over
  writing the same bytes from memory to one file and fsync;
- beside: a step's matrix multiplications while a save is being written, over without one;
- amortised: the stall, and the slower steps while it is written, over a run that saves every
  five minutes;
- megatron (with --megatron): the same state through Megatron's own spawned writers.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.cli import refusing
from tools.bench.pairs import Pairs, measure, report

INTERVAL_SECONDS = 300.0


def main(argv: list[str] | None = None) -> int:
    """Print each part with both of its sides."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=7, help="samples of each side")
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--megatron", action="store_true", help="also time Megatron's own saver")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        _all(args, Path(folder))
    return 0


def _all(args: argparse.Namespace, folder: Path) -> None:
    from megatron_ext.parallel import groups

    what = _state(args)
    size = _bytes(what)
    print(f"{size / 1e6:.0f} MB of tensors, {args.dtype}")
    stall, writing = _report_stall(what, folder, size, args.pairs)
    _report_save(what, folder, size, args.pairs)
    slower = _report_beside(what, folder, args.pairs)
    lost = stall + writing * max(0.0, 1 - 1 / slower)
    print(
        f"a background save every {INTERVAL_SECONDS:.0f} s: {stall:.3f} s stall, {writing:.2f} s "
        f"of steps {slower:.2f} x as long: {lost / INTERVAL_SECONDS:.3%} of step time; bar: 1 %"
    )
    if args.megatron:
        _report_megatron(what, folder)
    groups.stop()


def _state(args: argparse.Namespace) -> dict[str, Any]:
    """Model, optimizer with moments, and the rest that a save takes."""
    from megatron_ext.config import RunConfig
    from megatron_ext.devices.config import PrecisionConfig
    from megatron_ext.models.config import ModelConfig
    from megatron_ext.parallel import groups
    from megatron_ext.parallel.env import Env
    from megatron_ext.train.config import PhaseConfig

    model = ModelConfig(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.hidden_size * 8 // 3 // 32 * 32,
        num_attention_heads=8,
        vocab_size=8000,
    )
    phases = [PhaseConfig(tokens=1)]
    precision = PrecisionConfig(dtype=args.dtype)
    run = RunConfig(name="bench", model=model, phases=phases, precision=precision)
    process_groups = groups.start(run.parallel, Env.read({}), seed=1)

    from megatron_ext.models.gpt import build_model
    from megatron_ext.optim.build import build_optimizer

    chunks = build_model(run, process_groups)
    return {
        "run": run,
        "chunks": chunks,
        "optimizer": build_optimizer(run, chunks, process_groups),
        "groups": process_groups,
        "state": {"step": 1, "tokens": 0, "phase": 0},
    }


def _tensors(what: dict[str, Any]) -> list[Any]:
    from megatron_ext.checkpoint.state import slots

    return [slot.data for slot in slots(what["chunks"], what["optimizer"])]


def _bytes(what: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in _tensors(what))


def _report_stall(what: dict[str, Any], folder: Path, size: int, pairs: int) -> tuple[float, float]:
    """Median seconds of the stall, and of writing what it set aside."""
    import torch

    from megatron_ext.checkpoint.save import Staging, begin

    staging = Staging()
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source).copy_(source)
    ours, peer, writing = [], [], []
    for number in range(pairs + 1):
        started: list[Any] = []
        stall = measure(lambda into=started: into.append(begin(folder, **what, staging=staging)))
        written = measure(started[0].finish)
        copy = measure(lambda: target.copy_(source))
        if number:  # the first one finds neither memory mapped
            ours.append(stall)
            peer.append(copy)
            writing.append(written.wall)
    found = Pairs(ours=ours, peer=peer)
    report(
        f"stall of a background save of {size / 1e6:.0f} MB",
        found,
        ours="begin(staging=...)",
        peer="memcpy of the same bytes",
        bar="none set; see wall",
    )
    return found.median("ours", "wall"), statistics.median(writing)


def _report_save(what: dict[str, Any], folder: Path, size: int, pairs: int) -> None:
    from megatron_ext.checkpoint.save import save

    raw, ours, peer = _raw_write(folder, size), [], []
    for number in range(pairs + 1):
        mine = measure(lambda: save(folder, **what))
        theirs = measure(raw)
        for path in folder.iterdir():  # deleting is no part of either
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if number:
            ours.append(mine)
            peer.append(theirs)
    found = Pairs(ours=ours, peer=peer)
    report(
        f"plain save of {size / 1e6:.0f} MB",
        found,
        ours="save: tensors, hashes, fsync, seal, rename",
        peer="write of the same bytes to one file, fsync",
        bar="none set; see wall",
    )
    for side in ("ours", "peer"):
        print(f"  {side}: {size / found.median(side, 'wall') / 1e6:.0f} MB/s")


def _raw_write(folder: Path, size: int) -> Callable[[], None]:
    import os

    data = memoryview(bytearray(os.urandom(1 << 20)) * (size >> 20))

    def write() -> None:
        path = folder / "raw"
        with open(path, "wb", buffering=0) as file:
            done = 0
            while done < len(data):
                done += file.write(data[done:])
            os.fsync(file.fileno())

    return write


def _report_beside(what: dict[str, Any], folder: Path, pairs: int) -> float:
    """How much longer steps take meanwhile, by the wall clock."""
    import torch

    from megatron_ext.checkpoint.save import Staging, begin

    staging, matrix = Staging(), torch.randn(512, 512)

    def work() -> None:
        for _ in range(60):
            matrix @ matrix

    ours, peer = [], []
    for number in range(pairs + 1):
        pending = begin(folder, **what, staging=staging)
        during = measure(work)
        pending.finish()
        alone = measure(work)
        if number:
            ours.append(during)
            peer.append(alone)
    found = Pairs(ours=ours, peer=peer)
    report(
        "matrix multiplications while a save is written",
        found,
        ours="beside a save (CPU counts the writer's too)",
        peer="alone",
        bar="none set; see wall",
    )
    return found.ratio("wall")


def _report_megatron(what: dict[str, Any], folder: Path) -> None:
    """Megatron's writers on the same model and optimizer; three samples, the first one spawns."""
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
    from megatron.core.utils import unwrap_model

    (model,) = unwrap_model(what["chunks"])
    for number in range(3):
        path = folder / f"megatron{number}"
        path.mkdir()
        metadata = ensure_metadata_has_dp_cp_group(None)
        sharded = model.sharded_state_dict(metadata=metadata)
        whole = {"optimizer": what["optimizer"].sharded_state_dict(sharded), "model": sharded}
        sample = measure(lambda to=path, it=whole: dist_checkpointing.save(it, str(to)))
        print(f"megatron's own save, number {number + 1}: {sample.wall:.2f} s wall")
        shutil.rmtree(path)


if __name__ == "__main__":
    sys.exit(refusing(main))

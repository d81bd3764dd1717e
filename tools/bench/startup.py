"""Process start to the first step, split into parts, over ``import torch`` alone.

python -m tools.bench.startup
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from launch.cli import refusing
from tools.bench.pairs import interleave, report

PARTS = """
import json, os, resource, sys, time
def cpu():
    u = resource.getrusage(resource.RUSAGE_SELF)
    return u.ru_utime + u.ru_stime
marks = [("python", cpu())]
from launch.compose import compose
job = compose(json.loads(sys.argv[1]))
marks.append(("compose", cpu()))
import torch
marks.append(("import torch", cpu()))
from megatron_ext.devices import device
device.start()
marks.append(("import megatron.core", cpu()))
from megatron_ext.parallel import groups
from megatron_ext.parallel.env import Env
from megatron_ext.train.build import build_trainer
env = Env.read(os.environ)
process_groups = groups.start(job.parallel, env, seed=1, init_method="file://" + sys.argv[2])
marks.append(("process groups", cpu()))
trainer = build_trainer(job, env=env, groups=process_groups)
trainer.enter_phase(new=True)
marks.append(("model, optimizer, data", cpu()))
trainer.step()
marks.append(("first step", cpu()))
print(json.dumps(marks))
"""


def main(argv: list[str] | None = None) -> int:
    """Print the ratio, and CPU seconds of each part of one start."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = interleave(lambda: _start(folder), _torch, pairs=args.pairs)
        report(
            "process start to the first step",
            pairs,
            ours="launch to first step (tiny model, 1 rank)",
            peer="python -c 'import torch'",
            bar="none set: what is ours beside the imports must stay small",
        )
        before = 0.0
        for part, seconds in _start(folder):
            print(f"  {part:<26} {seconds - before:6.2f} CPU-s")
            before = seconds
    return 0


def _start(folder: Path) -> list[tuple[str, float]]:
    overrides = [
        "model=index_tiny",
        "name=startup",
        f"run_dir={folder}/run",
        "precision=fp32",
        "data.synthetic=true",
        "batch.global_batch_size=4",
        "batch.micro_batch_size=4",
        "batch.seq_length=32",
        "phases=[{tokens: 1000000}]",
    ]
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    command = [sys.executable, "-c", PARTS, json.dumps(overrides), str(meeting)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [tuple(mark) for mark in json.loads(done.stdout.splitlines()[-1])]


def _torch() -> None:
    subprocess.run([sys.executable, "-c", "import torch"], check=True)


if __name__ == "__main__":
    sys.exit(refusing(main))

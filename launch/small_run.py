"""A few real steps of a recipe on this machine's CPU, its layout shrunk to two ranks."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.config import JobConfig

SIZES = ("cluster", "scale", "parallel.", "batch.", "phases.", "launch.", "slurm.", "data.", "run_")
"""Words that set sizes or places: the small run has its own."""


def small_job(overrides: list[str], steps: int, folder: Path) -> "JobConfig":
    """The recipe at scale=tiny, its layout shrunk to two ranks, on random tokens."""
    from launch.compose import compose

    told = [word for word in overrides if not word.startswith(SIZES)]
    job = compose([*told, "scale=tiny", "scale.ranks=2"])
    first = job.phases[0]
    first.mixture, first.mixture_end, first.batch_steps = {}, {}, []
    job.batch.micro_batch_size = 1
    first.global_batch_size = job.batch.global_batch_size = 4
    first.tokens = steps * 4 * (first.seq_length or job.batch.seq_length)
    first.schedule.warmup_tokens = first.schedule.decay_tokens = 0
    first.schedule.horizon_tokens, first.schedule.name = None, "constant"
    first.batch_growth.max_global_batch_size = 0
    job.phases = [first]
    job.data.sources, job.data.validation, job.data.synthetic = {}, {}, True
    job.data.tokenizer.path = job.checkpoint.load = ""
    job.run_dir, job.launch.nproc = str(folder / "run"), 2
    return job


def small_run(overrides: list[str], steps: int) -> str:
    """A few real steps of the recipe on this machine's CPU, in processes of their own."""
    from launch.compose import save

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(small_job(overrides, steps, folder), folder / "config.yaml")
        done = subprocess.run(
            [sys.executable, "-m", "launch.train", "--config", str(folder / "config.yaml")],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).resolve().parents[1],
        )
        lines = (done.stderr.strip() or "no words").splitlines()
    if done.returncode:
        raise ValueError(f"the small run on 2 CPU ranks ended with {done.returncode}: {lines[-1]}")
    progress = [line for line in lines if "loss" in line]
    return f"2 CPU ranks: {progress[-1].split(' ', 2)[-1] if progress else lines[-1]}"

"""The words after ``srun``: how the ranks of one attempt are started. One list, no shell."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.resilience.attempts import Attempt

if TYPE_CHECKING:
    from launch.config import JobConfig

CHECKOUT = Path(__file__).resolve().parents[1]


def step_words(
    job: "JobConfig",
    run_dir: Path,
    attempt: Attempt,
    environ: Mapping[str, str],
    *,
    spare: bool = False,
) -> list[str]:
    """Options of srun and the command of each task of ``attempt``.

    ``spare``: a suspected node could be done without. Under torchrun's agents, which know no exit
    codes of ranks, none is.
    """
    tasks = _tasks_per_node(job, environ)
    per_node = 1 if job.cluster.launcher == "torchrun" else tasks
    words = [
        f"--nodes={job.slurm.nodes}",
        f"--ntasks={job.slurm.nodes * per_node}",
        f"--ntasks-per-node={per_node}",
        "--distribution=block",
        "--kill-on-bad-exit=1",
        "--unbuffered",
        "--label",
        "--open-mode=append",
        f"--output={run_dir}/logs/attempt-{attempt.number}.log",
        # All that the batch shell has, which is a short list already, and the attempt.
        f"--export=ALL,MEGATRON_EXT_ATTEMPT={attempt.attempt}"
        f",MEGATRON_EXT_SPARE_NODE={int(spare and job.cluster.launcher != 'torchrun')}",
        *_container(job),
    ]
    if job.cluster.cpus_per_task:
        words.append(f"--cpus-per-task={job.cluster.cpus_per_task}")
    return words + _command(job, run_dir, tasks)


def _tasks_per_node(job: "JobConfig", environ: Mapping[str, str]) -> int:
    """What sbatch was told; the cluster file's number where it was told nothing."""
    asked = environ.get("SLURM_NTASKS_PER_NODE", "")
    return int(asked) if asked.isdigit() else job.cluster.ranks_per_node()


def task_words(job: "JobConfig") -> list[str]:
    """Options of srun and the Python of a program of tools/, which runs on one node."""
    return [*_container(job), *_python(job)]


def _container(job: "JobConfig") -> list[str]:
    if not job.cluster.container or job.cluster.container_runtime != "pyxis":
        return []
    mounts = ",".join(job.cluster.container_mounts)
    words = [f"--container-image={job.cluster.container}", f"--container-workdir={CHECKOUT}"]
    return words + ([f"--container-mounts={mounts}"] if mounts else [])


def _command(job: "JobConfig", run_dir: Path, tasks: int) -> list[str]:
    if job.cluster.launcher == "torchrun":
        return [*_python(job), "-m", "launch.torchrun_node", str(run_dir), str(tasks)]
    return [*_python(job), "-m", "launch.rank", str(run_dir / "config.yaml")]


def _python(job: "JobConfig") -> list[str]:
    python = "python" if job.cluster.container else sys.executable
    words: list[str] = []
    if job.cluster.container and job.cluster.container_runtime == "apptainer":
        words = ["apptainer", "exec", "--nv", f"--pwd={CHECKOUT}"]
        words += [f"--bind={mount}" for mount in job.cluster.container_mounts]
        words.append(job.cluster.container)
    return [*words, python]


def environment(job: "JobConfig") -> dict[str, str]:
    """Variables of every rank, set in Python before anything heavy is imported."""
    values = dict(job.cluster.env)
    if job.cluster.network_interface:
        values["NCCL_SOCKET_IFNAME"] = values["GLOO_SOCKET_IFNAME"] = job.cluster.network_interface
    return values


def apply_environment(job: "JobConfig") -> None:
    """Set them in this process."""
    os.environ.update(environment(job))

"""A job as the exact sbatch command and the set-up that its batch shell reads. Pure."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.config import JobConfig

CHECKOUT = Path(__file__).resolve().parents[1]
TEMPLATE = CHECKOUT / "slurm" / "train.sbatch"
# Handed over from the submitting shell, and nothing else: sbatch otherwise keeps a copy of the
# whole environment, tokens included, in the controller's state folder.
EXPORT = (
    "HOME",
    "USER",
    "LANG",
    "PATH",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "MODULEPATH",
    "MODULESHOME",
)


def sbatch_command(job: "JobConfig", run_dir: Path) -> list[str]:
    """The words that queue the run, in sbatch's own long options."""
    words = ["sbatch", "--parsable", *options(job, run_dir)]
    return [*words, str(TEMPLATE), str(run_dir / "config.yaml")]


def options(job: "JobConfig", run_dir: Path) -> list[str]:
    """``--name=value`` for everything that the job or its cluster asks for."""
    cluster, slurm = job.cluster, job.slurm
    asked: dict[str, str | int | None] = {
        "job-name": job.name,
        "nodes": slurm.nodes,
        "ntasks-per-node": cluster.ranks_per_node(),
        "gpus-per-node": cluster.gpus_per_node,
        "cpus-per-task": cluster.cpus_per_task or None,
        "mem": cluster.memory,
        "time": slurm.time or cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": ",".join(slurm.exclude),
        "dependency": slurm.dependency,
        "kill-on-invalid-dep": "yes" if slurm.dependency else None,
        "signal": f"B:USR2@{cluster.signal_seconds}",
        "output": f"{run_dir}/logs/slurm-%j.log",
        "export": ",".join(dict.fromkeys([*EXPORT, *cluster.export])),
        "chdir": str(CHECKOUT),
    }
    words = [f"--{name}={value}" for name, value in asked.items() if value not in (None, "")]
    words += ["--exclusive"] if cluster.exclusive else []
    words += [
        f"--{name}={value}" if value else f"--{name}" for name, value in cluster.options.items()
    ]
    return words


def setup(job: "JobConfig") -> str:
    """Bash that the batch file sources: the modules, and the Python that submitted."""
    lines = ["# written by launch.submit from the cluster file"]
    lines += [f"module load {shlex.quote(name)}" for name in job.cluster.modules]
    if job.cluster.venv:
        activate = CHECKOUT / job.cluster.venv / "bin" / "activate"
        lines.append(f". {shlex.quote(str(activate))}")
    else:
        lines.append(f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH")
    return "\n".join(lines) + "\n"

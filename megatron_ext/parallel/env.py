"""Which rank this process is: from torchrun, from srun, or alone."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Env:
    """This process among the job's."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "localhost"
    master_port: int = 0
    """0 when nobody named a port: then one process is alone, or ranks meet through a file."""

    init_method: str = ""
    """How torch.distributed meets; empty when this process is alone."""

    attempt: str = ""
    """The attempt that this process belongs to, which must hold the run's lease to write."""

    spare_node: bool = False
    """Slurm has a node that could take the place of one of the attempt's."""

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> "Env":
        """Read torchrun's variables if they are there, else srun's, else be alone.

        Raises:
            ValueError: a launcher's variables are there in part, or are not numbers.
        """
        environ = os.environ if environ is None else environ
        attempt = environ.get("MEGATRON_EXT_ATTEMPT", "")
        spare = environ.get("MEGATRON_EXT_SPARE_NODE", "") == "1"
        if "RANK" in environ or "WORLD_SIZE" in environ:
            return replace(cls._torchrun(environ), attempt=attempt, spare_node=spare)
        if _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
            return replace(cls._srun(environ), attempt=attempt, spare_node=spare)
        return cls(attempt=attempt, spare_node=spare)

    @classmethod
    def _torchrun(cls, environ: Mapping[str, str]) -> "Env":
        world_size = _number(environ, "WORLD_SIZE")
        addr, port = environ.get("MASTER_ADDR", "localhost"), _number(environ, "MASTER_PORT", 0)
        # torchrun's agent already holds the store at this address: env:// knows, tcp:// does not.
        agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        meeting = "env://" if agent else f"tcp://{addr}:{port}" if port else ""
        return cls(
            rank=_number(environ, "RANK"),
            world_size=world_size,
            local_rank=_number(environ, "LOCAL_RANK", 0),
            local_world_size=_number(environ, "LOCAL_WORLD_SIZE", world_size),
            master_addr=addr,
            master_port=port,
            init_method=meeting,
        )

    @classmethod
    def _srun(cls, environ: Mapping[str, str]) -> "Env":
        # srun sets SLURM_STEP_*; a batch script sees SLURM_NTASKS but is one process.
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "localhost")
        addr = environ.get("MASTER_ADDR") or first_host(nodes)
        job, step = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_STEP_ID", 0)
        port = _number(environ, "MASTER_PORT", 20000 + (job * 7 + step) % 12000)
        world_size = _number(environ, "SLURM_STEP_NUM_TASKS")
        return cls(
            rank=_number(environ, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=_number(environ, "SLURM_LOCALID"),
            local_world_size=_tasks_here(environ, world_size),
            master_addr=addr,
            master_port=port,
            init_method=f"tcp://{addr}:{port}",
        )


def first_host(nodes: str) -> str:
    """First name of a Slurm host list: ``gpu[003-007,9],login1`` gives ``gpu003``."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes.strip())
    if not found:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} is not a list of hosts.")
    prefix, number, suffix = found.groups()
    return f"{prefix}{number or ''}{suffix}"


def _tasks_here(environ: Mapping[str, str], world_size: int) -> int:
    """Tasks of this step on this node, from ``4(x2),3``: two nodes of 4, then one of 3."""
    spelled = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", spelled):
        counts += [int(count)] * int(times or 1)
    node = _number(environ, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else world_size


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """An integer variable.

    Raises:
        ValueError: it is missing without a default, or is not a number.
    """
    value = environ.get(name)
    if value is None:
        if default is None:
            raise ValueError(f"environment variable {name} is missing: the launcher sets it.")
        return default
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"environment variable {name}={value!r} is not a number.") from None


def own_host() -> str:
    """Slurm's name of this node, else the short host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]

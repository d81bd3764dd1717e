"""One agent of torchrun a node: python -m launch.torchrun_node RUN_DIR RANKS, started by srun."""

import os
import sys
from pathlib import Path

from launch.cli import refusing


def words(run_dir: Path, ranks: int, *, nodes: int, node: int, addr: str, port: int) -> list[str]:
    """The agent's command. Static rendezvous: Slurm has said already who takes part."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={ranks}",
        f"--node-rank={node}",
        f"--master-addr={addr}",
        f"--master-port={port}",
        # A restart by the agents would count apart on each node: what follows is the policy's.
        "--max-restarts=0",
        "-m",
        "launch.train",
        "--config",
        str(run_dir / "config.yaml"),
    ]


def main() -> int:
    """Become the agent."""
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    from launch import compose
    from launch.step_words import apply_environment
    from megatron_ext.parallel.env import first_host

    run_dir = Path(sys.argv[1])
    apply_environment(compose.load(run_dir / "config.yaml"))
    command = words(
        run_dir,
        int(sys.argv[2]),
        nodes=int(os.environ["SLURM_STEP_NUM_NODES"]),
        node=int(os.environ["SLURM_NODEID"]),
        addr=first_host(os.environ["SLURM_STEP_NODELIST"]),
        port=20000
        + (int(os.environ["SLURM_JOB_ID"]) * 7 + int(os.environ["SLURM_STEP_ID"])) % 12000,
    )
    os.execv(command[0], command)


if __name__ == "__main__":
    raise SystemExit(refusing(main))

"""One task of a Slurm step: the warm parent of one rank of the run.

srun ... python -m launch.rank RUN_DIR/config.yaml
"""

import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli import refusing

if TYPE_CHECKING:
    from launch.config import JobConfig
    from megatron_ext.parallel.env import Env


def main() -> int:
    """Import everything once, then start, watch and restart the rank in forks of this process."""
    from launch import compose
    from launch.step_words import apply_environment
    from megatron_ext.parallel.env import Env

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    config = Path(sys.argv[1])
    job = compose.load(config)
    apply_environment(job)
    env = Env.read(os.environ)
    folder = config.parent.absolute() / "attempts" / env.attempt
    if env.local_rank == 0 and job.cluster.health_check:
        from launch.health import check_node

        if bad := check_node(job, config.parent):
            _set_aside(folder, bad)
            return 1
    _warm(job)
    return watch(job, env, folder)


def _warm(job: "JobConfig") -> None:
    """Import what a rank needs. Nothing here may touch CUDA: a fork could not use it then."""
    if job.cluster.gpus_per_node == 0:
        from megatron_ext.devices import device

        device.start()
    import megatron_ext.train.build  # noqa: F401


def _set_aside(folder: Path, why: str) -> None:
    """Leave word that this node is bad, for launch.attempt."""
    from megatron_ext.atomic import write_text

    (folder / "bad_nodes").mkdir(mode=0o700, exist_ok=True)
    write_text(folder / "bad_nodes" / socket.gethostname().split(".")[0], why + "\n")
    print(f"health check: {why}", file=sys.stderr)


def watch(job: "JobConfig", env: "Env", folder: Path) -> int:
    """Sit with the other watchers until the attempt ends."""
    from launch import train
    from megatron_ext.resilience import lease
    from megatron_ext.resilience.outcome import read_outcome
    from megatron_ext.resilience.watcher import Seat, Watcher

    run_dir = folder.parents[1]
    os.environ |= {
        "RANK": str(env.rank),
        "WORLD_SIZE": str(env.world_size),
        "LOCAL_RANK": str(env.local_rank),
        "LOCAL_WORLD_SIZE": str(env.local_world_size),
        "MASTER_ADDR": env.master_addr,
    }
    seat = Seat(
        rank=env.rank,
        world_size=env.world_size,
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0],
        address=env.master_addr,
        folder=folder,
        first_seconds=job.slurm.first_heartbeat_seconds,
        known_step=_furthest_failure(run_dir),
        watch=job.watch,
    )

    def task(port: int) -> int:
        os.environ["MASTER_PORT"] = str(port)
        from megatron_ext.train.callbacks.signs_of_life import SignsOfLife

        return train.train(job, first=(SignsOfLife(watcher.heartbeat),))

    watcher = Watcher(
        seat,
        task,
        may_go_on=lambda: (
            lease.holder(run_dir) == env.attempt
            and len(list(folder.glob("event-*.json"))) < job.slurm.restart.in_job
        ),
        has_outcome=lambda: read_outcome(run_dir, attempt=env.attempt) is not None,
    )
    return watcher.run()


def _furthest_failure(run_dir: Path) -> int:
    """The furthest step at which ranks of earlier attempts died or hung; -1 without one."""
    import json

    steps = [-1]
    for path in run_dir.glob("attempts/*/*event*.json"):
        try:
            event = json.loads(path.read_text())
            if event.get("class") in ("crash", "process", "hang", "short_exit"):
                steps.append(int(event["step"]))
        except (OSError, ValueError, KeyError):
            continue
    return max(steps)


if __name__ == "__main__":
    raise SystemExit(refusing(main))

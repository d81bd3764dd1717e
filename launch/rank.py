"""One task of a Slurm step: the warm parent of one rank of the run.

srun ... python -m launch.rank RUN_DIR/config.yaml
"""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli import refusing

if TYPE_CHECKING:
    from launch.config import JobConfig
    from megatron_ext.parallel.env import Env
    from megatron_ext.train.callback import Callback


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
        from launch.health import check_node, leave_word
        from megatron_ext.parallel.env import own_host

        if bad := check_node(job, config.parent):
            leave_word(folder, own_host(), bad)
            return 1
    _warm(job)
    return watch(job, env, folder)


def _warm(job: "JobConfig") -> None:
    """Import what a rank needs. Nothing here may touch CUDA: a fork could not use it then."""
    if job.cluster.gpus_per_node == 0:
        from megatron_ext.devices import device

        device.start()
    import megatron_ext.train.build  # noqa: F401


def watch(job: "JobConfig", env: "Env", folder: Path) -> int:
    """Sit with the other watchers until the attempt ends."""
    from launch import train
    from launch.health import bad_nodes
    from launch.patrol import Patrol
    from megatron_ext.parallel.env import own_host
    from megatron_ext.resilience import lease
    from megatron_ext.resilience.chair import Seat
    from megatron_ext.resilience.outcome import read_outcome
    from megatron_ext.resilience.watcher import Watcher

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
        host=own_host(),
        address=env.master_addr,
        folder=folder,
        first_seconds=job.slurm.first_heartbeat_seconds,
        known_step=_furthest_failure(run_dir),
        watch=job.watch,
    )

    def task(port: int) -> int:
        os.environ["MASTER_PORT"] = str(port)
        from launch.health_together import FitTogether
        from megatron_ext.train.callbacks.signs_of_life import SignsOfLife

        first: list[Callback] = [SignsOfLife(watcher.heartbeat)]
        if job.cluster.health_check and watcher.generation == 0:
            first.append(FitTogether(job.cluster, folder))
        return train.train(job, first=tuple(first))

    looks = env.local_rank == 0 and job.cluster.health_check
    patrol = Patrol(folder, seat.host, interval=job.cluster.health_interval_seconds if looks else 0)
    watcher = Watcher(
        seat,
        task,
        may_go_on=lambda: (
            lease.holder(run_dir) == env.attempt
            and not bad_nodes(folder)
            and len(list(folder.glob("event-*.json"))) < job.slurm.restart.in_job
        ),
        has_outcome=lambda: read_outcome(run_dir, attempt=env.attempt) is not None,
        unfit=patrol,
    )
    try:
        return watcher.run()
    finally:
        patrol.close()


def _furthest_failure(run_dir: Path) -> int:
    """The furthest step at which ranks of earlier attempts died or hung; -1 without one."""
    import json

    steps = [-1]
    for path in run_dir.glob("attempts/*/*event*.json"):
        try:
            event = json.loads(path.read_text())
            if event.get("class") in ("crash", "process", "hang", "short_exit", "numerics"):
                steps.append(int(event["step"]))
        except (OSError, ValueError, KeyError):
            continue
    return max(steps)


if __name__ == "__main__":
    raise SystemExit(refusing(main))

"""One task of a Slurm step: start one rank of the run, and watch over it.

srun ... python -m launch.rank RUN_DIR/config.yaml
"""

import os
import sys
from pathlib import Path

from launch.cli import refusing


def main() -> int:
    """Read the saved job, set its environment, train."""
    from launch import compose, train
    from launch.step_words import apply_environment
    from megatron_ext.parallel.env import Env

    job = compose.load(Path(sys.argv[1]))
    apply_environment(job)
    env = Env.read(os.environ)
    os.environ |= {
        "RANK": str(env.rank),
        "WORLD_SIZE": str(env.world_size),
        "LOCAL_RANK": str(env.local_rank),
        "LOCAL_WORLD_SIZE": str(env.local_world_size),
        "MASTER_ADDR": env.master_addr,
        "MASTER_PORT": str(env.master_port),
    }
    return train.train(job)


if __name__ == "__main__":
    raise SystemExit(refusing(main))

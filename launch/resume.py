"""Queue an ended run again, as it was: python -m launch.resume RUN_DIR [key=value ...]

Values may change what a resume lets change; training refuses the others, naming each.
"""

import argparse
import sys
from pathlib import Path

from launch.cli import refusing


def queue_again(run_dir: Path, overrides: list[str], *, dry_run: bool = False) -> None:
    """Submit the saved job of ``run_dir`` off the nodes that were set aside.

    Raises:
        ValueError: Slurm refused, or a job of the run is live.
    """
    from launch import compose
    from launch.after_attempt import set_aside
    from launch.site import asked_nodes, world_size
    from launch.submit import submit
    from megatron_ext.check import check_run
    from megatron_ext.checkpoint.resumable import check_resumable

    job = compose.override(compose.load(run_dir / "config.yaml"), overrides)
    job.slurm.exclude = sorted({*job.slurm.exclude, *set_aside(run_dir)})
    job.slurm.nodes = asked_nodes(job)
    job.run_dir = str(run_dir.absolute())
    check_run(job, world_size=world_size(job))
    check_resumable(job)
    submit(job, dry_run=dry_run, test_only=False)


def main() -> int:
    """Submit the saved job again from the newest good checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m launch.resume", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*", help="dotted.key=VALUE")
    parser.add_argument("--dry-run", action="store_true", help="print the command only")
    args = parser.parse_intermixed_args()
    queue_again(args.run_dir, args.overrides, dry_run=args.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(refusing(main))

"""Save and end a run: python -m launch.stop RUN_DIR [--now]"""

import argparse
import sys
from pathlib import Path

from launch import scheduler
from launch.cli import refusing
from launch.truth import live_job, look
from megatron_ext.atomic import write_text
from megatron_ext.resilience.stop import stop_file


def main() -> int:
    """Leave the request in the run folder; take a waiting job out of the queue."""
    parser = argparse.ArgumentParser(prog="python -m launch.stop", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--now", action="store_true", help="cancel the job without a save")
    args = parser.parse_args()
    if not (args.run_dir / "config.yaml").exists():
        raise FileNotFoundError(f"{args.run_dir} holds no run: config.yaml is missing.")
    before = look(args.run_dir)
    if before.truth in ("finished", "refused", "given up"):
        print(f"nothing to stop: {before.truth} at step {before.step}")
        return 0
    write_text(stop_file(args.run_dir), "asked by launch.stop\n")
    job_id = live_job(args.run_dir)
    if not job_id and before.truth == "running":
        print("asked: a run outside of Slurm saves after its running step and ends")
        return 0
    if not job_id:
        print(
            f"nothing of it runs: {before.truth} at step {before.step}; launch.observe leaves it "
            f"alone until launch.resume"
        )
        return 0
    waiting = scheduler.job(job_id).get("JobState") == "PENDING"
    if args.now or waiting:
        print(f"job {job_id} {'cancelled' if scheduler.cancel(job_id) else 'not cancelled'}")
    else:
        print(f"job {job_id} saves after the running step and ends")
    return 0


if __name__ == "__main__":
    sys.exit(refusing(main))

"""Save and end a run: python -m launch.stop RUN_DIR [--now]"""

import argparse
import sys
from pathlib import Path

from launch import scheduler
from launch.cli import refusing
from launch.truth import NO_ANSWER, live_job, look
from megatron_ext.atomic import write_text
from megatron_ext.resilience.stop import stop_file


def main() -> int:
    """Leave the request in the run folder; take a waiting job out of the queue.

    Exit code 1: a job was to be cancelled and was not. The request is left all the same.
    """
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
    if before.slurm == NO_ANSWER:
        print(
            f"asked: {NO_ANSWER}; where job {before.job_id} runs, it saves after its running step "
            f"and ends{', and it is not cancelled' if args.now else ''}"
        )
        return int(args.now)
    job_id = live_job(args.run_dir)
    if not job_id and before.truth == "running":
        print("asked: a run outside of Slurm saves after its running step and ends")
        if args.now:
            print("--now cancels jobs of Slurm: end this one without a save by killing its process")
        return int(args.now)
    if not job_id:
        print(
            f"nothing of it runs: {before.truth} at step {before.step}; launch.observe leaves it "
            f"alone until launch.resume"
        )
        return 0
    waiting = scheduler.job(job_id).get("JobState") == "PENDING"
    if args.now or waiting:
        cancelled = scheduler.cancel(job_id)
        print(f"job {job_id} {'cancelled' if cancelled else 'not cancelled'}")
        return int(not cancelled)
    print(f"job {job_id} saves after the running step and ends")
    return 0


if __name__ == "__main__":
    sys.exit(refusing(main))

"""Is this node fit for a run: python -m launch.health RUN_DIR [--during]

Disk space and a write, the clock, GPUs and their ECC counts, the kernel log, a matrix product, and
the site's own program; --during a run all but the last two, which would slow it down. Exit code 0
when fit, 1 with one line that says why not, 3 when it is the disk of the run folder, which all
nodes share. What takes several nodes: launch/health_together.py.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli import refusing
from megatron_ext.atomic import write_text
from megatron_ext.resilience.log_rules import RULES

if TYPE_CHECKING:
    from launch.config import JobConfig

MIN_FREE_BYTES = 1 << 30
MAX_CLOCK_SECONDS = 60.0
MATRIX = 1024
KERNEL_LOG_BYTES = 4 << 20
SPEAKS_OF_HARDWARE = [rule.pattern for rule in RULES if rule.name in ("gpu", "node")]
SINCE_SECONDS = 900


def check_node(job: "JobConfig", run_dir: Path) -> str:
    """Why this node must not take part; empty when it may."""
    return (
        check_disk(run_dir)
        or check_running(job, run_dir)
        or check_product(job.cluster.min_product_gflops)
        or check_site(job.cluster.health_command)
    )


def check_running(job: "JobConfig", run_dir: Path) -> str:
    """The same while a run is under way: what costs it nothing."""
    return (
        check_clock(run_dir)
        or check_gpus(job.cluster.gpus_per_node)
        or check_kernel_log(job.cluster.kernel_log)
    )


def check_disk(folder: Path) -> str:
    """Space where the run is kept, and one file written, flushed, read back and removed."""
    if (free := shutil.disk_usage(folder).free) < MIN_FREE_BYTES:
        return (
            f"{folder}: No space left on device: {free >> 20} MiB free, "
            f"{MIN_FREE_BYTES >> 20} MiB are needed"
        )
    probe, data = folder / f".probe.{uuid.uuid4().hex}", os.urandom(4096)
    try:
        with open(probe, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if probe.read_bytes() != data:
            return f"{folder}: a file reads back differently than it was written"
    except OSError as error:
        return f"{folder}: cannot write: {error.strerror}"
    finally:
        probe.unlink(missing_ok=True)
    return ""


def check_clock(folder: Path) -> str:
    """This node's clock against the file server's."""
    probe = folder / f".clock.{uuid.uuid4().hex}"
    try:
        probe.touch()
        offset = abs(probe.stat().st_mtime - time.time())
    except OSError as error:
        return f"{folder}: cannot write: {error.strerror}"
    finally:
        probe.unlink(missing_ok=True)
    if offset > MAX_CLOCK_SECONDS:
        return f"the clock is {offset:.0f} s off the file server's"
    return ""


def check_gpus(wanted: int) -> str:
    """Presence and uncorrected ECC errors, by nvidia-smi."""
    if not wanted:
        return ""
    words = [
        "nvidia-smi",
        "--query-gpu=index,ecc.errors.uncorrected.volatile.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer: {error}"
    rows = [line.split(",") for line in done.stdout.splitlines() if "," in line]
    if done.returncode or len(rows) < wanted:
        return f"{len(rows)} GPUs answer, {wanted} are needed"
    bad = [row[0].strip() for row in rows if row[1].strip().isdigit() and int(row[1]) > 0]
    return f"GPU {', '.join(bad)}: uncorrected ECC errors" if bad else ""


def check_kernel_log(path: str) -> str:
    """Recent lines that mean broken hardware. A log that may not be read says nothing."""
    try:
        if path:
            with open(path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - KERNEL_LOG_BYTES))
                text = file.read().decode(errors="replace")
        else:
            words = ["dmesg", "--level=emerg,alert,crit,err"]
            text = subprocess.run(
                words, capture_output=True, text=True, timeout=20, check=False
            ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    for line in text[-KERNEL_LOG_BYTES:].splitlines():
        if any(p.search(line) for p in SPEAKS_OF_HARDWARE) and _recent(line):
            return line.strip()[:300]
    return ""


def _recent(line: str) -> bool:
    """Within the last quarter of an hour, by dmesg's seconds since boot; unknown counts."""
    found = re.match(r"\[\s*(\d+\.\d+)\]", line)
    if not found:
        return True
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - float(found[1]) < SINCE_SECONDS


def check_product(min_gflops: float) -> str:
    """A matrix product on the CPU, right and not absurdly slow."""
    import numpy as np

    ones = np.ones((MATRIX, MATRIX), dtype=np.float32)
    start = time.perf_counter()
    product = ones @ ones
    seconds = time.perf_counter() - start
    if not bool((product == MATRIX).all()):
        return "a matrix product came out wrong"
    gflops = 2 * MATRIX**3 / seconds / 1e9
    if gflops < min_gflops:
        return (
            f"a matrix product runs at {gflops:.2f} GFLOP/s on the CPU, below "
            f"cluster.min_product_gflops={min_gflops:g}"
        )
    return ""


def check_site(command: list[str]) -> str:
    """The site's own program; its last line of output is the reason."""
    if not command:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return f"{command[0]}: {lines[-1] if lines else done.returncode}" if done.returncode else ""


def leave_word(folder: Path, host: str, why: str) -> None:
    """Write into an attempt's folder that a node is bad, for launch.attempt and its watchers."""
    (folder / "bad_nodes").mkdir(mode=0o700, exist_ok=True)
    write_text(folder / "bad_nodes" / host, why + "\n")
    print(f"health check: {why}", file=sys.stderr)


def bad_nodes(folder: Path) -> dict[str, str]:
    """Nodes that were found bad in the attempt of ``folder``, and why."""
    return {path.name: path.read_text()[:1000].strip() for path in folder.glob("bad_nodes/*")}


def main() -> int:
    """Check this node for the run in RUN_DIR."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--during", action="store_true", help="only what does not slow a run down")
    args = parser.parse_args()
    from launch import compose

    check = check_running if args.during else check_node
    disk = check_disk(args.run_dir)
    why = disk or check(compose.load(args.run_dir / "config.yaml"), args.run_dir)
    print(why or "fit")
    return 3 if disk else 1 if why else 0


if __name__ == "__main__":
    sys.exit(refusing(main))

"""A throw-away Slurm cluster, and runs on it, for Python."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ext.resilience.progress import last_metrics

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = CHECKOUT / "tests" / "slurm" / "loopback.sh"


def missing() -> str:
    """Why a cluster cannot be started here; empty when it can."""
    if os.getuid():
        return "a loopback cluster needs root"
    absent = [c for c in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(c)]
    return f"{', '.join(absent)} not installed: {SCRIPT} install" if absent else ""


class Cluster:
    """Nodes n1..nN with a controller. ``net``: each node has an address of its own."""

    def __init__(self, nodes: int = 3, *, net: bool = False) -> None:
        # Short, as unix sockets lie below it.
        self.folder = Path(tempfile.mkdtemp(prefix="lb", dir="/tmp"))
        self.environ = {**os.environ, "SLURM_CONF": f"{self.folder}/c/etc/slurm.conf"}
        self.environ |= {"OMP_NUM_THREADS": "1", "LOOPBACK_NET": str(int(net))}
        # A person has activated the environment whose Python the batch file is to find.
        self.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        # The prolog fails on node N while the file prolog-fails-N is there.
        test = f'#!/bin/sh\n[ ! -e "{self.folder}/prolog-fails-$SLURMD_NODENAME" ]\n'
        (self.folder / "prolog").write_text(test)
        (self.folder / "prolog").chmod(0o755)
        (self.folder / "extra.conf").write_text(f"Prolog={self.folder}/prolog\n")
        self.environ["LOOPBACK_EXTRA"] = str(self.folder / "extra.conf")
        self.do("start", str(nodes))

    def do(self, verb: str, *words: str) -> str:
        """A verb of loopback.sh.

        Raises:
            RuntimeError: it failed; with its own words.
        """
        done = subprocess.run(
            [str(SCRIPT), verb, f"{self.folder}/c", *words],
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"loopback.sh {verb} {words}: {done.stdout}{done.stderr}")
        return done.stdout

    def slurm(self, *words: str) -> str:
        """Output of a Slurm client command."""
        return self.do("exec", *words)

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        """``python -m`` one of our programs where the controller can be reached."""
        return subprocess.run(
            [str(SCRIPT), "exec", f"{self.folder}/c", sys.executable, "-m", *words],
            env=self.environ,
            capture_output=True,
            text=True,
            cwd=CHECKOUT,
            check=False,
        )

    def close(self) -> None:
        """Stop and remove everything."""
        self.do("clean")
        shutil.rmtree(self.folder, ignore_errors=True)


class Run:
    """One submitted run."""

    def __init__(self, cluster: Cluster, folder: Path, overrides: list[str]) -> None:
        self.cluster, self.folder, self.overrides = cluster, folder, overrides
        self.started = time.monotonic()

    def submit(self) -> "Run":
        """Queue it with launch.submit.

        Raises:
            RuntimeError: it was refused.
        """
        done = self.cluster.python("launch.submit", *self.overrides)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return self

    @property
    def job_id(self) -> str:
        """The job that was queued last."""
        return (self.folder / "job").read_text().strip()

    def status(self) -> dict[str, Any]:
        """What launch.status knows."""
        done = self.cluster.python("launch.status", str(self.folder), "--json")
        return json.loads(done.stdout) if done.returncode == 0 else {"truth": done.stderr}

    def metrics(self) -> list[dict[str, Any]]:
        """Every line about a training step."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [m for m in found if "loss" in m]

    def step(self) -> int:
        """Steps taken."""
        return int(last_metrics(self.folder).get("step", 0))

    def attempts(self) -> list[dict[str, Any]]:
        """The newest record of each attempt."""
        newest: dict[str, dict[str, Any]] = {}
        try:
            for line in (self.folder / "attempts.jsonl").read_text().splitlines():
                record = json.loads(line)
                newest[record["attempt"]] = record
        except FileNotFoundError:
            pass
        return list(newest.values())

    def events(self) -> list[dict[str, Any]]:
        """What ended generations of ranks, oldest first."""
        paths = self.folder.glob("attempts/*/event-*.json")
        return sorted((json.loads(p.read_text()) for p in paths), key=lambda e: e["time"])

    def wait(self, ready: Callable[[], bool], *, seconds: float, what: str) -> float:
        """Seconds until ``ready``.

        Raises:
            TimeoutError: with the run's own words.
        """
        start = time.monotonic()
        while not ready():
            if time.monotonic() - start > seconds:
                raise TimeoutError(f"{what} not within {seconds:.0f} s:\n{self.words()}")
            time.sleep(0.3)
        return time.monotonic() - start

    def wait_step(self, step: int, *, seconds: float = 900) -> float:
        """Until ``step`` steps are taken."""
        return self.wait(lambda: self.step() >= step, seconds=seconds, what=f"step {step}")

    def wait_truth(self, *words: str, seconds: float = 900) -> float:
        """Until launch.status says one of ``words``; asked when a record changed, or each 5 s."""
        seen: list[float] = []

        def ready() -> bool:
            records = [self.folder / name for name in ("outcome", "attempts.jsonl", "job")]
            newest = max((p.stat().st_mtime for p in records if p.exists()), default=0.0)
            if seen and newest == seen[0] and time.monotonic() - seen[1] < 5:
                return False
            seen[:] = [newest, time.monotonic()]
            return self.status()["truth"] in words

        return self.wait(ready, seconds=seconds, what=" or ".join(words))

    def wait_gone(self, *, seconds: float = 180) -> float:
        """Until no job of it is in the queue."""
        return self.wait(
            lambda: self.folder.name not in self.cluster.slurm("squeue", "-h", "-o", "%j"),
            seconds=seconds,
            what="an empty queue",
        )

    def pids(self, node: str, rank: int) -> list[int]:
        """Processes of a rank: the watcher first, then the rank itself."""
        text = self.cluster.do("pids", node, f"SLURM_PROCID={rank}")
        return [int(p) for p in text.split()]

    def rank_pids(self, node: str, rank: int) -> list[int]:
        """The watcher of a rank and the rank; without the batch shell, which is a rank 0 too."""
        parents: dict[int, int] = {}
        for pid in self.pids(node, rank):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if b"launch.rank" in words and b"srun" not in words[0]:
                parents[pid] = int(stat[1])
        # Numbers of processes start again at some time: only who is whose child tells them apart.
        watchers = [pid for pid, parent in parents.items() if parent not in parents]
        return watchers + [pid for pid, parent in parents.items() if parent in watchers]

    def log(self) -> str:
        """What the ranks of all attempts said."""
        return "".join(
            p.read_text(errors="replace") for p in sorted(self.folder.glob("logs/attempt-*.log"))
        )

    def words(self) -> str:
        """The end of everything it wrote."""
        parts = [self.status().get("truth", "")]
        for path in sorted(self.folder.glob("logs/*.log"), key=lambda p: p.stat().st_mtime)[-3:]:
            parts.append(f"--- {path.name}\n" + path.read_text(errors="replace")[-1500:])
        return "\n".join(parts)

"""Slurm as a folder of small programs that keep what they are told; the real one: tests/slurm."""

import os
from pathlib import Path

import pytest


class Slurm:
    """Programs on PATH that answer from files and write down their arguments."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        self.program("squeue", "")
        self.program("sinfo", "echo n1; echo n2")
        self.program("scancel", "")
        self.program("sbatch", "echo 77")
        self.program("scontrol", f'[ "$1" = requeue ] || cat {folder}/job 2>/dev/null')
        monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")

    def program(self, name: str, body: str) -> None:
        """``name`` does ``body``, in sh."""
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> {self.folder}/told\n{body}\n')
        path.chmod(0o755)

    def knows(self, state: str, run_dir: Path) -> None:
        """Job 12 of the run is in ``state``; empty: there is no such job."""
        text = f"JobId=12 JobName=x JobState={state} StdOut={run_dir}/logs/x Restarts=0\n"
        (self.folder / "job").write_text(text if state else "")

    def dies(self) -> None:
        """No controller answers."""
        for name in ("squeue", "scontrol", "sbatch", "scancel"):
            self.program(name, "exit 1")

    def told(self, name: str) -> list[str]:
        """What ``name`` was called with."""
        path = self.folder / "told"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(name)]

"""A corpus, a reference run and the checks A to F that every row of the matrix ends with."""

import copy
import json
import os
import threading
from pathlib import Path
from typing import Any

from tools.drills.cluster import Cluster, Run

STEPS = 36
INTERVAL = 6
VOCAB = 512


def write_corpus(folder: Path) -> dict[str, str]:
    """Two small corpora of random tokens; their prefixes by name."""
    import numpy as np

    from megatron_ext.data.writer import CorpusWriter

    chance = np.random.default_rng(5)
    prefixes = {}
    for name in ("zh", "en"):
        prefix = folder / name
        with CorpusWriter(prefix, dtype=np.uint16) as writer:
            for _ in range(400):
                writer.add_document(chance.integers(1, 500, size=int(chance.integers(20, 200))))
        prefixes[name] = str(prefix)
    return prefixes


class Lab:
    """Runs of one small job on one cluster, compared with one that nobody disturbed."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.folder = cluster.folder / "runs"
        self.folder.mkdir()
        self.sources = write_corpus(self.folder)
        self.seed = 0
        """Moves steps and ranks at which faults are struck."""
        self.timers: list[threading.Timer] = []
        """What is to be undone later."""
        self._reference: dict[int, tuple[list[Any], Any]] = {}

    def run(self, name: str, *more: str, steps: int = STEPS, nodes: int = 2) -> Run:
        """A run of this job, not yet submitted."""
        overrides = [
            f"name={name}",
            f"run_dir={self.folder}/{name}",
            "model=llama_tiny",
            "model.num_layers=2",
            "precision=fp32",
            "cluster=loopback",
            f"slurm.nodes={nodes}",
            f"phases=[{{tokens:{steps * 4 * 32},mixture:{{zh:0.5,en:0.5}}}}]",
            "batch.seq_length=32",
            "batch.global_batch_size=4",
            f"checkpoint.interval_steps={INTERVAL}",
            "launch.threads_per_rank=1",  # the nodes share the cores of one machine
            "logging.tensorboard=false",
            "slurm.restart.backoff_seconds=1",
            *(f"data.sources.{k}={{path:{v}}}" for k, v in self.sources.items()),
            *more,
        ]
        return Run(self.cluster, self.folder / name, overrides)

    def on(self, cluster: Cluster) -> "Lab":
        """The same job on another cluster."""
        other = copy.copy(self)
        other.cluster = cluster
        return other

    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint of this job."""
        self.reference(STEPS)
        folder = self.folder / f"reference{STEPS}" / "checkpoints"
        return sum(p.stat().st_size for p in sorted(folder.glob("step_*"))[-1].iterdir())

    def reference(self, steps: int) -> tuple[list[Any], Any]:
        """Losses and final ledger of the undisturbed run; made once for each length."""
        if steps not in self._reference:
            run = self.run(f"reference{steps}", steps=steps).submit()
            run.wait_truth("finished")
            run.wait_gone()
            self._reference[steps] = (curve(run), final_state(run))
        return self._reference[steps]

    def end(self, run: Run, *, steps: int = STEPS, causes: list[str] | None = None) -> list[str]:
        """Wait until nothing of ``run`` is left, then ``check`` it."""
        run.wait_truth("finished", "given up")
        run.wait_gone()
        return self.check(run, steps=steps, causes=causes)

    def check(self, run: Run, *, steps: int = STEPS, causes: list[str] | None = None) -> list[str]:
        """What of A to F does not hold; empty when all do."""
        wrong = []
        losses, state = self.reference(steps)
        status = run.status()
        if status["truth"] != "finished" or status["step"] != steps:
            wrong.append(f"A: {status['truth']} at step {status['step']}")
        if curve(run) != losses:
            wrong.append("B: losses differ from the undisturbed run's")
        if final_state(run) != state:
            wrong.append("C: samples or ledger differ from the undisturbed run's")
        wrong += [f"D: {why}" for why in damaged(run)]
        seen = [a["failure"] for a in run.attempts()] + [e["class"] for e in run.events()]
        wrong += [f"E: no {cause} among {seen}" for cause in causes or [] if cause not in seen]
        wrong += [f"F: {left}" for left in left_behind(run)]
        return wrong


def curve(run: Run) -> list[Any]:
    """Step, loss and gradient norm of every step, to the last bit."""
    return [(m["step"], m["loss"], m["grad_norm"], m["tokens"]) for m in run.metrics()]


def final_state(run: Run) -> dict[str, Any]:
    """Counts, ledger and decisions of the newest checkpoint."""
    newest = sorted((run.folder / "checkpoints").glob("step_*"))[-1]
    return dict(json.loads((newest / "state.json").read_text()))


def passed_over(run: Run, undisturbed: dict[str, Any]) -> list[str]:
    """What does not add up where one decision was to skip samples: C for such a run.

    Every sample that was passed over counts as read, and as skipped; nothing else was read.
    """
    state, wrong = final_state(run), []
    (skip,) = state["skipped"]
    samples = skip["past"] - skip["first"]
    per_sample = undisturbed["tokens"] // undisturbed["samples"]
    counts = {
        "skipped windows": (sum(s["skipped_windows"] for s in state["consumed"].values()), samples),
        "tokens read": (
            sum(s["tokens"] for s in state["consumed"].values()),
            undisturbed["tokens"] + samples * per_sample,
        ),
    }
    for key in ("step", "tokens", "samples", "phase"):
        counts[key] = (state[key], undisturbed[key])
    for what, (found, due) in counts.items():
        if found != due:
            wrong.append(f"C: {found} {what}, not {due}")
    return wrong


def damaged(run: Run) -> list[str]:
    """Checkpoints that do not verify."""
    from megatron_ext.checkpoint.folder import DamagedCheckpoint, verify

    found = []
    for path in sorted((run.folder / "checkpoints").glob("step_*")):
        try:
            verify(path)
        except DamagedCheckpoint as error:
            found.append(str(error))
    return found


def left_behind(run: Run) -> list[str]:
    """Processes and half-written files that outlived the run."""
    left = [f"{p} is left" for p in run.folder.rglob(".*") if p.suffix == ".tmp"]
    left += [f"{p} is left" for p in run.folder.rglob(".beat-*")]
    names = {a["attempt"] for a in run.attempts()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ = (process / "environ").read_bytes()
        except OSError:
            continue
        if int(process.name) != os.getpid() and any(n.encode() in environ for n in names):
            left.append(f"process {process.name} is left")
    return left

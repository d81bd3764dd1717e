"""Small real runs: this repository's own text, byte by byte, through ``launch.train``."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

SMALL = {
    "model": "index_tiny",
    "model.num_layers": 4,
    "model.hidden_size": 512,
    "model.ffn_hidden_size": 1472,
    "model.num_attention_heads": 8,
    "model.vocab_size": 257,
    "model.max_position_embeddings": 512,
    "optimizer.lr": 1e-3,
    "batch.seq_length": 512,
    "batch.global_batch_size": 16,
    "batch.micro_batch_size": 8,
    "checkpoint.interval_steps": 1000,
    "logging.tensorboard": False,
}
"""An Index shape that FP8 takes (multiples of 32 at TP 2), at 12 M parameters."""

TINY = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 192,
    "model.num_attention_heads": 4,
    "batch.seq_length": 64,
    "batch.global_batch_size": 4,
    "batch.micro_batch_size": 2,
}
"""What a rehearsal on a CPU changes."""


def corpus(folder: Path) -> Path:
    """Prefix of an indexed corpus of this repository's Markdown and Python, one byte a token."""
    import numpy as np

    from megatron_ext.data.writer import CorpusWriter

    files = sorted(
        [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("megatron_ext/**/*.py")]
    )
    with CorpusWriter(folder / "own", dtype=np.uint16) as writer:
        for file in files:
            if data := file.read_bytes():
                tokens = np.frombuffer(data, dtype=np.uint8).astype(np.uint16)
                writer.add_document(np.append(tokens, np.uint16(256)))
    return folder / "own"


def overrides(
    run_dir: Path, prefix: Path, *, steps: int, settings: dict[str, Any] | None = None
) -> list[str]:
    """The command line of a small run."""
    chosen = {**SMALL, **(settings or {})}
    tokens = steps * chosen["batch.global_batch_size"] * chosen["batch.seq_length"]
    mixture = "{}" if chosen.get("data.synthetic") else "{own: 1.0}"
    phase = f"{{tokens: {tokens}, schedule: {{name: constant}}, mixture: {mixture}}}"
    typed = [f"{key}={_text(value)}" for key, value in chosen.items()]
    typed += ["name=gpu", f"run_dir={run_dir}", f"phases=[{phase}]"]
    if not chosen.get("data.synthetic"):
        typed += [f"data.sources={{own: {{path: {prefix}, max_epochs: 50}}}}"]
    return typed


def train(
    run_dir: Path,
    prefix: Path,
    *,
    steps: int,
    ranks: int = 1,
    settings: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Train ``steps`` steps in ranks of their own; the metrics of each.

    Raises:
        AssertionError: the run failed; the end of what it said is in the message.
    """
    asked = overrides(run_dir, prefix, steps=steps, settings=settings)
    launcher = [sys.executable, "-m", "launch.train"]
    if ranks > 1:
        agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        launcher = [sys.executable, *agent, "-m", "launch.train"]
    done = subprocess.run(
        [*launcher, *asked],
        cwd=ROOT,
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def script(module: str, *arguments: str, cpu: bool = False) -> str:
    """Run one of this folder's scripts in a process of its own; what it prints last.

    Raises:
        AssertionError: it failed.
    """
    environ = {k: v for k, v in os.environ.items() if not k.startswith("NVTE_")}
    if cpu:
        environ["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.gpu.{module}", *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

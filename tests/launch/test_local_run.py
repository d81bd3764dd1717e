"""A run without Slurm is stopped, looked at and gone on with by the same commands."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.resilience.outcome import Outcome, write_outcome

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_canary_9876543210"
WORDS = ["name=local", "model=llama_tiny", "data.synthetic=true", "batch.seq_length=32"]
WORDS += ["model.num_layers=2", "batch.global_batch_size=2", "logging.tensorboard=false"]
WORDS += ["phases=[{tokens:6400000}]", "launch.threads_per_rank=1"]


def _command(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"launch.{name}", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def _train_until(run_dir: Path, step: int, *words: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-m", "launch.train", *words], cwd=ROOT)
    end = time.monotonic() + 180
    while _state(run_dir).get("step", 0) < step:
        assert process.poll() is None, f"ended with code {process.returncode} before step {step}"
        assert time.monotonic() < end
        time.sleep(0.3)
    return process


def _state(run_dir: Path) -> dict:
    if not (run_dir / "metrics.jsonl").exists():
        return {}
    state: dict = json.loads(_command("status", str(run_dir), "--json").stdout)
    return state


def _listens_on(parent: int) -> set[str]:
    """Addresses on which the ranks of ``parent`` wait for connections."""
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    table += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    waiting = {row[9]: row[1].split(":")[0] for row in table if row[3] == "0A"}
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    found = set()
    for pid in [str(parent), *children]:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if (inode := os.readlink(link)[8:-1]) in waiting:
                    found.add(socket.inet_ntoa(bytes.fromhex(waiting[inode])[::-1]))
    return found


def test_stop_status_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    process = _train_until(run_dir, 2, *WORDS, f"run_dir={run_dir}", "launch.nproc=2")
    assert _listens_on(process.pid) == {"127.0.0.1"}
    assert _state(run_dir)["truth"] == "running"
    assert "saves after its running step" in _command("stop", str(run_dir)).stdout
    assert process.wait(timeout=120) == 0
    stopped = _state(run_dir)
    assert (stopped["truth"], stopped["cause"]) == ("stopped", "asked to stop")
    assert stopped["saved_step"] == stopped["step"] > 0

    # The request is over: the same run goes on, and is not stopped again by it.
    further = stopped["step"] + 2
    process = _train_until(run_dir, further, "--config", str(run_dir / "config.yaml"))
    assert TOKEN.encode() not in b"".join(p.read_bytes() for p in run_dir.rglob("*") if p.is_file())
    process.terminate()
    assert process.wait(timeout=120) == 0
    state = _state(run_dir)
    assert (state["truth"], state["cause"]) == ("stopped", "terminated")
    assert run_dir.stat().st_mode & 0o077 == 0


def test_stop_where_nothing_runs_says_so_and_is_what_status_shows(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    cfg = _command("train", "--cfg", "job", *WORDS, f"run_dir={run_dir}").stdout
    (run_dir / "config.yaml").write_text(cfg)
    assert "nothing of it runs: new at step 0" in _command("stop", str(run_dir)).stdout
    assert ": stopped (asked to stop, and nothing" in _command("status", str(run_dir)).stdout
    assert "a person asked it to stop" in _command("observe", str(run_dir), "--once").stdout

    (run_dir / "stop-requested").unlink()
    write_outcome(run_dir, Outcome(word="finished", step=7))
    assert _command("stop", str(run_dir)).stdout == "nothing to stop: finished at step 0\n"
    assert not (run_dir / "stop-requested").exists()


@pytest.mark.parametrize("name", ["status", "stop", "resume", "health", "observe"])
def test_a_folder_without_a_run_is_one_sentence(name: str, tmp_path: Path) -> None:
    done = _command(name, str(tmp_path), *(["--once"] if name == "observe" else []))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(tmp_path) in done.stderr


def test_resume_without_slurm_says_how_to_go_on(tmp_path: Path) -> None:
    cfg = _command("train", "--cfg", "job", *WORDS, f"run_dir={tmp_path}/run").stdout
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "run" / "config.yaml").write_text(cfg)
    environ = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "launch.resume", str(tmp_path / "run")],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"python -m launch.train --config {tmp_path}/run/config.yaml" in done.stderr

"""One launch.train a folder: a finished run is not run again, nor taken for another one."""

import subprocess
import sys
from pathlib import Path

from tools import curves


def run_once(run_dir: Path, words: list[str], *, log: Path | None = None) -> None:
    """Start or resume the run in ``run_dir`` unless it has finished; its output goes to ``log``.

    Raises:
        ValueError: the words make no run, it did not finish, or the folder holds another one.
    """
    from launch.compose import compose, load
    from megatron_ext.resilience.outcome import read_outcome

    words = [*words, f"run_dir={run_dir}"]
    job = compose(words)
    done = read_outcome(run_dir) if run_dir.exists() else None
    if done is not None and done.word == "finished":
        if found := curves.differences(load(run_dir / "config.yaml"), job):
            raise ValueError(
                f"{run_dir} holds a finished run with {found[0].key}={found[0].stored}, and "
                f"{found[0].asked} is asked for: give another --out, or delete it."
            )
        return
    command = [sys.executable, "-m", "launch.train", *words]
    print(f"{run_dir}: {' '.join(command[1:])}", flush=True)
    if log is None:
        code = subprocess.run(command).returncode
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        raise ValueError(f"{run_dir} ended with {code}: see {log or run_dir / 'logs'}")

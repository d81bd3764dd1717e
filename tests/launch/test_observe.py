"""The observer helps a run whose job is dead or lost, within policy, and leaves others alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import observe
from launch.attempt import begin, end
from launch.compose import load
from launch.truth import look
from megatron_ext.resilience import attempts, lease
from megatron_ext.resilience.lease import LostLease
from megatron_ext.resilience.outcome import Outcome, write_outcome
from megatron_ext.resilience.stop import stop_file
from tests.launch.slurm_programs import Slurm
from tests.launch.test_attempt import ENVIRON, SMALL

ROOT = Path(__file__).resolve().parents[2]
LONG_AGO = time.time() - 5000


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setattr(observe.scheduler.time, "sleep", lambda _seconds: None)
    return Slurm(tmp_path / "slurm", monkeypatch)


def _run(tmp_path: Path, *more: str) -> Path:
    """A run whose attempt began in job 12 and was never heard of again."""
    environ = {**ENVIRON, "SLURM_JOB_ID": "12"}
    folder = begin([*SMALL, f"run_dir={tmp_path}/run", "cluster=loopback", *more], environ)
    _age(folder.parents[1])
    return folder.parents[1]


def _age(run_dir: Path) -> None:
    for path in [*run_dir.rglob("*"), run_dir]:
        os.utime(path, (LONG_AGO, LONG_AGO))


def _look(run_dir: Path, *, log_only: bool = False) -> int:
    return observe.observe(run_dir, silence=900.0, log_only=log_only)


def test_a_running_job_without_a_sign_is_requeued_and_fenced_off(
    tmp_path: Path, slurm: Slurm
) -> None:
    run_dir = _run(tmp_path)
    slurm.knows("RUNNING", run_dir)
    before = lease.holder(run_dir)
    assert _look(run_dir) == 1
    assert slurm.told("scontrol requeue") == ["scontrol requeue 12"]
    (record,) = attempts.history(run_dir)
    assert (record.failure, record.action, record.counted) == ("hang", "requeue", True)
    with pytest.raises(LostLease):
        lease.check(run_dir, before)
    assert _look(run_dir) == 0, "it has only just been helped"
    assert len(slurm.told("scontrol requeue")) == 1


def test_signs_of_life_and_ends_are_left_alone(tmp_path: Path, slurm: Slurm) -> None:
    run_dir = _run(tmp_path)
    slurm.knows("RUNNING", run_dir)
    (attempt,) = attempts.history(run_dir)
    (run_dir / "attempts" / attempt.attempt / "alive").touch()
    assert observe.look(run_dir, silence=900.0).word == "alive"
    _age(run_dir)
    stop_file(run_dir).touch()
    assert observe.look(run_dir, silence=900.0).word == "over"
    stop_file(run_dir).unlink()
    write_outcome(run_dir, Outcome(word="finished", attempt=attempt.attempt))
    assert _look(run_dir) == 0
    assert slurm.told("scontrol requeue") == slurm.told("sbatch") == []


def test_a_job_that_slurm_has_ended_without_a_word_is_not_shown_as_running(
    tmp_path: Path, slurm: Slurm
) -> None:
    run_dir = _run(tmp_path)
    (run_dir / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    slurm.knows("RUNNING", run_dir)
    assert look(run_dir).truth == "running"
    slurm.knows("FAILED", run_dir)
    seen = look(run_dir)
    assert (seen.truth, seen.cause) == ("quiet", "job 12 is FAILED and left no word")


def test_a_waiting_job_is_waited_for(tmp_path: Path, slurm: Slurm) -> None:
    run_dir = _run(tmp_path)
    slurm.knows("PENDING", run_dir)
    assert observe.look(run_dir, silence=900.0).word == "waiting"
    assert _look(run_dir) == 0


@pytest.mark.parametrize("state", ["", "FAILED"])
def test_a_job_that_slurm_lost_or_dropped_is_submitted_again(
    tmp_path: Path, slurm: Slurm, state: str
) -> None:
    run_dir = _run(tmp_path)
    slurm.knows(state, run_dir)
    assert _look(run_dir) == 1
    (line,) = slurm.told("sbatch")
    assert line.endswith(f"slurm/train.sbatch {run_dir}/config.yaml")
    assert (run_dir / "job").read_text() == "77\n"
    assert slurm.told("scontrol requeue") == []


def test_a_job_whose_record_was_lost_before_it_began_is_submitted_again(
    tmp_path: Path, slurm: Slurm
) -> None:
    """Row 32: the controller died right after sbatch; the run folder holds no attempt."""
    from launch.compose import compose
    from launch.submit import record, sbatch_command

    job = compose([*SMALL, f"run_dir={tmp_path}/run", "cluster=loopback"])
    record(job, tmp_path / "run", sbatch_command(job, tmp_path / "run"))
    (tmp_path / "run" / "job").write_text("12\n")
    _age(tmp_path / "run")
    assert _look(tmp_path / "run") == 1
    assert len(slurm.told("sbatch")) == 1


def test_a_requeue_that_slurm_refused_is_made_up_for(tmp_path: Path, slurm: Slurm) -> None:
    """Row 30: the batch file ended with 75, and nobody queued the job again."""
    run_dir = _run(tmp_path)
    (attempt,) = attempts.history(run_dir)
    slurm.dies()
    assert end(run_dir / "attempts" / attempt.attempt, 1, "USR2", ENVIRON) == "requeue"
    _age(run_dir)
    assert _look(run_dir) == 3, "blind: what Slurm does not say is not known"
    Slurm.__init__(slurm, tmp_path / "again", pytest.MonkeyPatch())
    assert _look(run_dir) == 1
    assert len(slurm.told("sbatch")) == 1


def test_help_in_vain_ends(tmp_path: Path, slurm: Slurm) -> None:
    run_dir = _run(tmp_path)
    slurm.knows("", run_dir)
    codes = []
    for _ in range(5):
        codes.append(_look(run_dir))
        _age(run_dir)
    assert codes == [1, 1, 1, 1, 0]
    assert len(slurm.told("sbatch")) == 3
    assert attempts.history(run_dir)[-1].action == "stop"


def test_log_only_and_a_second_observer_do_nothing(tmp_path: Path, slurm: Slurm) -> None:
    run_dir = _run(tmp_path)
    slurm.knows("RUNNING", run_dir)
    assert _look(run_dir, log_only=True) == 1
    with observe.alone(run_dir) as free:
        assert free
        assert _look(run_dir) == 0
    assert slurm.told("scontrol requeue") == []
    assert attempts.history(run_dir)[-1].ended is None
    job = load(run_dir / "config.yaml")
    job.slurm.restart.log_only = True
    sight = observe.look(run_dir, silence=900.0)
    said = observe.act(run_dir, job, sight, holder=lease.holder(run_dir), log_only=False)
    assert said.startswith("log only: would requeue")


def test_an_attempt_that_begins_meanwhile_wins(tmp_path: Path, slurm: Slurm) -> None:
    run_dir = _run(tmp_path)
    slurm.knows("RUNNING", run_dir)
    holder, sight = lease.holder(run_dir), observe.look(run_dir, silence=900.0)
    begin([*SMALL, f"run_dir={run_dir}", "cluster=loopback"], ENVIRON)
    with pytest.raises(LostLease):
        observe.act(run_dir, load(run_dir / "config.yaml"), sight, holder=holder, log_only=False)
    assert slurm.told("scontrol requeue") == []


def test_once_is_for_cron(tmp_path: Path, slurm: Slurm) -> None:
    run_dir = _run(tmp_path)
    slurm.knows("RUNNING", run_dir)
    words = [sys.executable, "-m", "launch.observe", str(run_dir), "--once", "--log-only"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "log only: would requeue" in done.stdout
    done = subprocess.run(
        [*words[:3], str(tmp_path), "--once"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "holds no run" in done.stderr
    assert json.loads((run_dir / "lease").read_text())["attempt"] != ""

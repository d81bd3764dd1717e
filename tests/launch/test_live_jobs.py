"""Commands on the folder of a Slurm job: one writer, the right job, and what nobody can know."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch import observe, resume, status, stop, submit, train
from launch.attempt import begin
from launch.cli import refusing
from launch.compose import compose, load
from launch.status import lines
from launch.truth import live_job, look
from megatron_ext.resilience import attempts, lock
from megatron_ext.resilience.outcome import Outcome, write_outcome
from megatron_ext.resilience.stop import stop_file
from tests.launch.slurm_programs import Slurm
from tests.launch.test_attempt import ENVIRON, SMALL

IN_12 = {**ENVIRON, "SLURM_JOB_ID": "12"}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setattr("launch.scheduler.time.sleep", lambda _seconds: None)
    return Slurm(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def run_dir(tmp_path: Path, slurm: Slurm) -> Path:
    """A run whose attempt began in job 12, which runs."""
    begin(_words(tmp_path / "run"), IN_12)
    slurm.knows("RUNNING", tmp_path / "run")
    return tmp_path / "run"


def _words(run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, f"run_dir={run_dir}", "cluster=loopback", *more]


def _run(main: Callable[[], int | None], *words: object) -> int:
    """The exit code of a command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, words)])
        return refusing(main)


def _folder(run_dir: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(run_dir.rglob("*")) if p.is_file()}


def test_a_local_start_is_refused_while_the_job_of_the_folder_lives(
    run_dir: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _folder(run_dir)
    assert _run(train.main, "--config", run_dir / "config.yaml") == 2
    assert f"{run_dir} is the folder of job 12, which has not ended" in capsys.readouterr().err
    slurm.dies()
    assert _run(train.main, "--config", run_dir / "config.yaml") == 2
    assert "job 12, and Slurm does not answer" in capsys.readouterr().err
    assert _folder(run_dir) == before


def test_a_local_start_without_slurm_is_kept_off_by_signs_of_life_alone(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.scheduler.present", lambda: False)
    with pytest.raises(ValueError, match="folder of job 12"):
        train.refuse_live(run_dir)
    (last,) = attempts.history(run_dir)
    attempts.append(run_dir, replace(last, started=time.time() - 5000))
    train.refuse_live(run_dir)


@pytest.mark.parametrize("state", ["", "FAILED"])
def test_a_dead_job_whose_attempt_left_no_word_keeps_nobody_off(
    run_dir: Path, slurm: Slurm, state: str
) -> None:
    slurm.knows(state, run_dir)
    train.refuse_live(run_dir)


def test_a_job_that_sbatch_started_by_hand_is_the_runs_job(run_dir: Path, slurm: Slurm) -> None:
    assert (run_dir / "job").read_text() == "12\n"
    begin(_words(run_dir), {**ENVIRON, "SLURM_JOB_ID": "13"})
    assert look(run_dir).job_id == live_job(run_dir) == "13"
    assert _run(resume.main, run_dir) == 2
    assert _run(stop.main, run_dir, "--now") == 0
    assert slurm.told("scancel") == ["scancel 13"]
    assert slurm.told("sbatch") == []


def test_each_run_of_an_array_has_a_job_of_its_own(
    tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*_words(tmp_path / "arr"), "slurm.nodes=1", "seed=1,2"]
    assert _run(submit.main, "--multirun", *words) == 0
    runs = [tmp_path / "arr-0", tmp_path / "arr-1"]
    assert [(run / "job").read_text() for run in runs] == ["77_0\n", "77_1\n"]
    command = f"Command=slurm/train.sbatch {tmp_path}/arr.runs/list"
    facts = f"JobId=77 ArrayJobId=77 JobState=PENDING Reason=Resources {command}\n"
    (slurm.folder / "job").write_text(facts)
    assert (look(runs[1]).truth, look(runs[1]).job_id) == ("waiting", "77_1")
    assert _run(submit.main, "--multirun", *words) == 2
    assert "folder of job 77_0, which has not ended" in capsys.readouterr().err
    assert _run(stop.main, runs[1]) == 0
    assert slurm.told("scancel") == ["scancel 77_1"]

    # Its request is there when it begins, and is obeyed; Slurm's own number says nothing.
    task = {"SLURM_JOB_ID": "79", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1"}
    begin([f"{tmp_path}/arr.runs/list"], {**ENVIRON, **task})
    assert stop_file(runs[1]).exists()
    assert attempts.history(runs[1])[-1].job_id == "77_1"
    other = tmp_path / "arr-11"  # no run of that array
    submit.record(compose(_words(other)), other, ["sbatch"])
    (other / "job").write_text("77_1\n")
    assert live_job(other) == ""


def test_what_cannot_be_known_without_a_controller_is_said(
    run_dir: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.dies()
    assert _run(status.main, run_dir) == 0
    assert "job 12: Slurm does not answer" in capsys.readouterr().out
    assert _run(stop.main, run_dir, "--now") == 1
    said = capsys.readouterr().out
    assert "Slurm does not answer; where job 12 runs, it saves" in said
    assert "it is not cancelled" in said
    assert stop_file(run_dir).exists()
    assert look(run_dir).truth == "quiet"
    assert _run(stop.main, run_dir) == 0
    before = _folder(run_dir)
    assert _run(resume.main, run_dir, "seed=5") == 2
    assert "Slurm does not answer" in capsys.readouterr().err
    assert _folder(run_dir) == before


def test_an_ended_run_is_ended_whether_slurm_answers_or_not(run_dir: Path, slurm: Slurm) -> None:
    slurm.dies()
    (last,) = attempts.history(run_dir)
    attempts.append(run_dir, replace(last, ended=time.time(), action="stop", failure="config"))
    assert look(run_dir).truth == "given up"
    train.refuse_live(run_dir)


def test_a_resume_that_slurm_refuses_changes_nothing(run_dir: Path, slurm: Slurm) -> None:
    slurm.knows("FAILED", run_dir)
    stop_file(run_dir).touch()
    slurm.program("sbatch", "echo no such partition >&2; exit 1")
    before = (run_dir / "config.yaml").read_bytes()
    assert _run(resume.main, run_dir, "watch.straggler_strikes=true") == 2
    assert (run_dir / "config.yaml").read_bytes() == before
    assert stop_file(run_dir).exists()
    slurm.program("sbatch", "echo 78")
    assert _run(resume.main, run_dir, "watch.straggler_strikes=true") == 0
    assert load(run_dir / "config.yaml").watch.straggler_strikes
    assert not stop_file(run_dir).exists()
    assert (run_dir / "job").read_text() == "78\n"


def test_a_dry_resume_refuses_what_a_resume_would(
    run_dir: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(resume.main, run_dir, "--dry-run") == 2
    assert "has not ended" in capsys.readouterr().err
    slurm.knows("FAILED", run_dir)
    assert _run(resume.main, run_dir, "batch.global_batch_size=3", "--dry-run") == 0
    assert _run(resume.main, run_dir, "batch.global_batch_size=0", "--dry-run") == 2
    assert slurm.told("sbatch") == []


def test_a_cancel_that_slurm_refused_is_no_success(run_dir: Path, slurm: Slurm) -> None:
    slurm.program("scancel", "exit 1")
    assert _run(stop.main, run_dir, "--now") == 1


def test_now_says_what_it_does_outside_of_slurm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit.record(compose(_words(tmp_path / "run")), tmp_path / "run", ["sbatch"])
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    assert _run(stop.main, tmp_path / "run", "--now") == 1
    assert "--now cancels jobs of Slurm" in capsys.readouterr().out


def test_a_run_that_a_person_stopped_is_stopped_while_its_job_completes(
    run_dir: Path, slurm: Slurm
) -> None:
    (last,) = attempts.history(run_dir)
    write_outcome(run_dir, Outcome(word="stopped", cause="asked to stop", attempt=last.attempt))
    slurm.knows("COMPLETING", run_dir)
    assert look(run_dir).truth == "running", "its end is not written down yet"
    ended = replace(last, ended=time.time(), failure="stopped")
    attempts.append(run_dir, replace(ended, action="stop", reason="a person stopped it"))
    assert (look(run_dir).truth, look(run_dir).cause) == ("stopped", "asked to stop")
    attempts.append(run_dir, replace(ended, action="requeue"))
    assert look(run_dir).truth == "running", "a time limit goes on in another job"


def test_nodes_are_shown_as_set_aside_for_as_long_as_they_are(run_dir: Path) -> None:
    (last,) = attempts.history(run_dir)
    for age, shown in ((3600, ["n2"]), (90000, [])):
        attempts.append(run_dir, replace(last, ended=time.time() - age, excluded=["n2"]))
        assert look(run_dir).excluded == shown


def test_noise_in_a_run_folder_is_named_and_passed_over(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = b'\xff\x00{"step": "x", "loss": 1}\n{"step": "9z", "loss": 2.0}\n[1]\nnull\n'
    (run_dir / "metrics.jsonl").write_bytes(b'{"step": 3, "loss": 1.5}\n' + noise)
    assert (look(run_dir).step, look(run_dir).loss) == (3, 1.5)
    (run_dir / "config.yaml").write_bytes(noise)
    assert any("damaged" in line and "config.yaml" in line for line in lines(look(run_dir)))
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o700)
    (empty / "config.yaml").write_bytes(noise)
    for main in (status.main, stop.main):
        assert _run(main, empty) == 2
        assert f"{empty}/config.yaml is not a saved job" in capsys.readouterr().err
    assert not stop_file(empty).exists()


def test_a_submission_is_refused_while_a_local_run_trains_in_the_folder(
    tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    with lock.held(folder):
        assert _run(submit.main, "--dry-run", *_words(folder)) == 2
        assert f"run_dir={folder} is being trained by process" in capsys.readouterr().err
    assert _run(submit.main, "--dry-run", *_words(folder)) == 0


@pytest.mark.parametrize("word", ["--silence=-3", "--silence=nan", "--interval=-3", "--interval=0"])
def test_an_observer_that_cannot_be_meant_is_refused(
    run_dir: Path, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(observe.main, run_dir, "--once", word) == 2
    assert f"{word.split('=')[0]}=" in capsys.readouterr().err

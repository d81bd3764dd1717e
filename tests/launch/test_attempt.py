"""The ends of an attempt are told apart from what is on disk, without any scheduler."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch import attempt, health, scheduler
from launch.after_attempt import cancel_successors, notify, release, spare_node
from launch.compose import compose, load
from launch.status import lines
from launch.submit import note_queued
from launch.truth import look
from megatron_ext.resilience import attempts, lease, stragglers, suspicions
from megatron_ext.resilience.attempts import Attempt
from megatron_ext.resilience.outcome import Outcome, write_outcome
from megatron_ext.resilience.stop import stop_file
from megatron_ext.resilience.stragglers import Straggler
from megatron_ext.resilience.suspicions import Suspicion

ROOT = Path(__file__).resolve().parents[2]
ENVIRON = {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
SMALL = ["name=small", "model=llama_tiny", "phases=[{tokens:4096}]", "data.synthetic=true"]
SMALL += ["batch.seq_length=64", "slurm.restart.backoff_seconds=0"]


def _begin(tmp_path: Path) -> Path:
    return attempt.begin([*SMALL, f"run_dir={tmp_path}/run"], ENVIRON)


def _end(folder: Path, code: int = 1, asked: str = "") -> tuple[str, Attempt]:
    action = attempt.end(folder, code, asked, ENVIRON)
    history = attempts.history(folder.parents[1])
    return action.split()[0], next(a for a in history if a.attempt == folder.name)


@pytest.mark.parametrize(
    ("facts", "want"),
    [
        ({"JobState": "RUNNING"}, "RUNNING"),
        ({"JobState": "COMPLETING", "Restarts": "0", "TimeLimit": "1-00:00:00"}, "CANCELLED"),
        ({"JobState": "COMPLETING", "Restarts": "1"}, "REQUEUED"),
        (
            {"JobState": "COMPLETING", "TimeLimit": "00:01:00", "RunTime": "00:01:15"},
            "TIMEOUT",
        ),
        (
            {"JobState": "COMPLETING", "TimeLimit": "UNLIMITED", "RunTime": "1-02:00:00"},
            "CANCELLED",
        ),
        ({}, ""),
    ],
)
def test_what_slurm_has_decided_is_read_behind_its_word(facts: dict, want: str) -> None:
    assert scheduler.fate(facts, 0) == want


def test_an_attempt_begins_with_a_lease_a_record_and_the_words_of_its_step(tmp_path: Path) -> None:
    folder = _begin(tmp_path)
    assert lease.holder(tmp_path / "run") == folder.name
    words = (folder / "step").read_text().splitlines()
    assert words[-3:] == ["-m", "launch.rank", f"{tmp_path}/run/config.yaml"]
    export = f"--export=ALL,MEGATRON_EXT_ATTEMPT={folder.name},MEGATRON_EXT_SPARE_NODE=0"
    assert export in words
    assert look(tmp_path / "run").attempts[0]["number"] == 0


def test_what_a_killed_rank_was_writing_does_not_stay(tmp_path: Path) -> None:
    folder = _begin(tmp_path)
    aside = folder / ".rank-1.2.error.5039.8341635d.tmp"
    aside.write_text("half")
    kept = folder / "rank-1.1.error"
    kept.write_text("whole")
    _end(folder)
    assert not aside.exists()
    assert kept.read_text() == "whole"


def test_another_number_of_nodes_than_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"slurm\.nodes=4, and Slurm gave 1"):
        attempt.begin([*SMALL, f"run_dir={tmp_path}/run", "slurm.nodes=4"], ENVIRON)


@pytest.mark.parametrize(
    ("word", "cause", "action", "name"),
    [
        ("finished", "", "done", "finished"),
        ("refused", "no such file", "stop", "config"),
        ("stopped", "time limit", "requeue", "stopped"),
        ("stopped", "asked to stop", "stop", "stopped"),
    ],
)
def test_the_outcome_word_decides(
    tmp_path: Path, word: str, cause: str, action: str, name: str
) -> None:
    folder = _begin(tmp_path)
    write_outcome(tmp_path / "run", Outcome(word=word, cause=cause, attempt=folder.name))
    done, record = _end(folder, 0)
    assert (done, record.failure) == (action, name)


def test_exit_code_0_without_a_word_is_tried_again(tmp_path: Path) -> None:
    action, record = _end(_begin(tmp_path), 0)
    assert (action, record.failure) == ("again", "short_exit")


def test_three_attempts_without_progress_end_the_run(tmp_path: Path) -> None:
    folder = _begin(tmp_path)
    actions = []
    for _ in range(3):
        (folder.parents[1] / "logs").mkdir(exist_ok=True)
        answer = attempt.end(folder, 1, "", ENVIRON)
        actions.append(answer.split()[0])
        folder = Path(answer.split()[-1])
    assert actions == ["again", "again", "stop"]
    assert look(tmp_path / "run").truth == "given up"


def test_an_older_copy_ends_and_leaves_the_record_of_the_newer_alone(tmp_path: Path) -> None:
    older = _begin(tmp_path)
    newer = _begin(tmp_path)
    assert attempt.end(older, 1, "", ENVIRON) == "stop"
    assert lease.holder(tmp_path / "run") == newer.name
    assert attempts.history(tmp_path / "run")[-1].ended is None


def test_an_attempt_that_ended_without_a_word_is_closed_by_the_next(tmp_path: Path) -> None:
    _begin(tmp_path)
    _begin(tmp_path)
    first, second = attempts.history(tmp_path / "run")
    assert (first.failure, first.counted) == ("node", False)
    assert second.ended is None


def test_a_cause_that_a_restart_in_place_has_dealt_with_is_not_read_again(tmp_path: Path) -> None:
    folder = _begin(tmp_path)
    said = "0: 12:00:00 process: rank 1 was ended by signal 7\n"
    log = folder.parents[1] / "logs" / "attempt-0.log"
    log.write_text(f"1: OSError: [Errno 28] No space left on device\n{said}1: going on\n{said}")
    event = {"class": "process", "headline": "rank 1 was ended by signal 7", "node": "n2"}
    (folder / "last_event.json").write_text(json.dumps(event))
    assert _end(folder)[1].failure == "storage"
    (tmp_path / "second").mkdir()
    folder = _begin(tmp_path / "second")
    (folder.parents[1] / "logs" / "attempt-0.log").write_text(log.read_text())
    for name in ("event-0.json", "last_event.json"):
        (folder / name).write_text(json.dumps(event))
    assert _end(folder)[1].failure == "process"


def test_log_only_says_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    words = [*SMALL, f"run_dir={tmp_path}/run", "slurm.restart.log_only=true"]
    _, record = _end(attempt.begin(words, ENVIRON), 1)
    assert (record.action, record.reason) == ("stop", "log only: would again")


def test_a_requeued_job_keeps_the_configuration_it_was_first_given(tmp_path: Path) -> None:
    folder = _begin(tmp_path)
    again = {**ENVIRON, "SLURM_RESTART_COUNT": "1"}
    attempt.begin([*SMALL, f"run_dir={tmp_path}/run", "seed=99"], again)
    assert load(folder.parents[1] / "config.yaml").seed != 99


def test_a_hook_gets_values_as_words_and_its_failure_changes_nothing(tmp_path: Path) -> None:
    record = Attempt(number=0, attempt="a", failure="crash", action="stop", headline="$(touch X)")
    script = "import sys; open(sys.argv[1] + '/told', 'w').write('|'.join(sys.argv[2:]))"
    notify([sys.executable, "-c", script], tmp_path, record)
    assert (tmp_path / "told").read_text().startswith("crash|stop|")
    notify(["/nonexistent"], tmp_path, record)


def test_cancelling_successors_twice_or_without_any_is_fine(tmp_path: Path) -> None:
    cancel_successors(tmp_path)
    (tmp_path / "successors.json").write_text('{"999999": "convert"}')
    cancel_successors(tmp_path)
    cancel_successors(tmp_path)


def test_stop_leaves_its_request_and_a_new_attempt_forgets_it(tmp_path: Path) -> None:
    folder = _begin(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "launch.stop", str(tmp_path / "run")], cwd=ROOT, check=False
    )
    assert done.returncode == 0
    assert stop_file(tmp_path / "run").exists()
    assert _end(folder, 0)[1].failure == "cancelled"
    _begin(tmp_path)
    assert not stop_file(tmp_path / "run").exists()


def test_a_request_to_stop_outlives_a_start_that_came_after_it(tmp_path: Path) -> None:
    def starts(**environ: str) -> bool:
        """A request is there, then a job begins: it is there still."""
        stop_file(tmp_path / "run").touch()
        words = [*SMALL, f"run_dir={tmp_path}/run"]
        attempt.end(attempt.begin(words, {**ENVIRON, **environ}), 1, "", ENVIRON)
        return stop_file(tmp_path / "run").exists()

    _end(_begin(tmp_path))
    (tmp_path / "run" / "job").write_text("12\n")
    assert starts(SLURM_JOB_ID="12"), "asked while the job of launch.submit was starting"
    assert starts(SLURM_JOB_ID="12", SLURM_RESTART_COUNT="1"), "asked while it was requeued"
    assert not starts(SLURM_JOB_ID="13"), "a person has used sbatch since"
    assert (tmp_path / "run" / "job").read_text() == "13\n"
    stop_file(tmp_path / "run").touch()
    note_queued(tmp_path / "run", "14")
    assert not stop_file(tmp_path / "run").exists(), "a person has used launch.submit since"


def test_a_request_between_two_attempts_of_a_job_is_obeyed(tmp_path: Path, monkeypatch) -> None:
    def asked_meanwhile(_seconds: float) -> None:
        stop_file(tmp_path / "run").touch()

    monkeypatch.setattr("launch.after_attempt.time.sleep", asked_meanwhile)
    assert _end(_begin(tmp_path))[0] == "again"
    assert stop_file(tmp_path / "run").exists()


def test_logs_cannot_forge_progress_or_move_the_cursor_of_a_reader(tmp_path: Path) -> None:
    folder = _begin(tmp_path)
    log = tmp_path / "run" / "logs" / "attempt-0.log"
    log.write_text("iteration 1000/1000 finished\n\x1b[2J\x1b[31mRuntimeError: \x1b]0;x\x07boo\n")
    assert _end(folder, 1)[1].step_after == 0
    done = subprocess.run(
        [sys.executable, "-m", "launch.status", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\x1b" not in done.stdout


def test_health_names_a_full_disk_a_broken_gpu_and_the_sites_own_reason(tmp_path: Path) -> None:
    assert health.check_disk(tmp_path) == ""
    assert "cannot write" in health.check_disk(Path("/proc/self")) or "free" in health.check_disk(
        Path("/proc/self")
    )
    assert health.check_clock(tmp_path) == ""
    assert health.check_product(0.01) == ""
    assert "below cluster.min_product_gflops=1e+06" in health.check_product(1e6)
    log = tmp_path / "kern.log"
    log.write_text("NVRM: Xid (PCI:0000:3b:00): 13, pid=7, Graphics Exception\n")
    assert health.check_kernel_log(str(log)) == ""
    log.write_text("NVRM: Xid (PCI:0000:3b:00): 79, pid=7, GPU has fallen off the bus.\n")
    assert "79" in health.check_kernel_log(str(log))
    assert health.check_site(["sh", "-c", "echo fan 3 is dead; exit 1"]) == "sh: fan 3 is dead"
    assert "GPU" in health.check_gpus(1) or "nvidia-smi" in health.check_gpus(1)


def test_a_slow_rank_is_in_the_status_and_a_strike_only_where_asked_for(tmp_path: Path) -> None:
    for asked, suspects in (("false", []), ("true", ["n7"])):
        words = [*SMALL, f"run_dir={tmp_path}/{asked}", f"watch.straggler_strikes={asked}"]
        folder = attempt.begin(words, ENVIRON)
        slow = Straggler(rank=3, node="n7", ratio=2.0, seconds=0.2, step=30, attempt=folder.name)
        stragglers.record(tmp_path / asked, slow)
        assert "rank 3 on n7 is slow" in "\n".join(lines(look(tmp_path / asked)))
        assert _end(folder, 1)[1].suspects == suspects


def test_status_of_a_run_needs_no_scheduler_and_is_quick(tmp_path: Path) -> None:
    _begin(tmp_path)
    start = time.process_time()
    state = look(tmp_path / "run")
    assert state.total_steps == compose(SMALL).phases[0].tokens // (8 * 64)
    assert time.process_time() - start < 2


def test_a_suspected_node_comes_back_when_the_step_was_as_bad_elsewhere(tmp_path: Path) -> None:
    found = Suspicion(phase=0, first=8, step=3, rank=1, node="n2", attempt="a", fault="NaN")
    for verdict, left in (("", ["n2"]), ("hardware", ["n2"]), ("workload", [])):
        folder = tmp_path / (verdict or "open")
        folder.mkdir()
        past = Attempt(number=0, attempt="a", ended=time.time(), excluded=["n2"], suspects=["n2"])
        attempts.append(folder, past)
        suspicions.record(folder, replace(found, verdict=verdict))
        release(folder)
        assert attempts.history(folder)[0].excluded == left


def test_a_superseded_copy_takes_no_node_back_in_anothers_history(tmp_path: Path) -> None:
    folder = _begin(tmp_path)
    run = folder.parents[1]
    past = Attempt(number=0, attempt="a", ended=time.time(), excluded=["n2"], suspects=["n2"])
    attempts.append(run, past)
    found = Suspicion(phase=0, first=8, step=3, rank=1, node="n2", attempt="a", fault="NaN")
    suspicions.record(run, replace(found, verdict="workload"))
    before = (run / "attempts.jsonl").read_bytes()
    lease.take(run, "newer")
    assert attempt.end(folder, 1, "", ENVIRON).split()[0] == "stop"
    assert (run / "attempts.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("pool", "down", "excluded", "spare"),
    [
        ({"n1", "n2", "n3"}, [], [], True),
        ({"n1", "n2"}, [], [], False),
        ({"n1", "n2", "n3"}, ["n3"], [], False),
        ({"n1", "n2", "n3"}, [], ["n3"], False),
        ({"n1", "n2", "n3", "n4"}, [], ["n3"], False),  # one of four is all that may be set aside
    ],
)
def test_a_node_is_spare_where_slurm_has_another_and_the_policy_may_set_one_aside(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pool: set[str],
    down: list[str],
    excluded: list[str],
    spare: bool,
) -> None:
    attempts.append(tmp_path, Attempt(number=0, attempt="a", ended=time.time(), excluded=excluded))
    monkeypatch.setattr(scheduler, "pool", lambda _partition: pool)
    monkeypatch.setattr(scheduler, "unusable", lambda ns: {n: "down" for n in ns if n in down})
    now = Attempt(number=1, attempt="b", job_id="7", nodes=["n1", "n2"])
    job = compose([*SMALL, "cluster=loopback"])
    assert spare_node(tmp_path, job, now) is spare
    job.slurm.requeue = False
    assert not spare_node(tmp_path, job, now)

"""The shipped batch file with the real trainer on a real Slurm of several nodes.

The whole fault matrix is ``make test-faults`` (tools/faults.py); here is its quick part.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import TOKEN
from tools.drills.cluster import CHECKOUT, Run
from tools.drills.lab import INTERVAL, STEPS, Lab
from tools.drills.rank_faults import wrong_config
from tools.drills.storage_faults import killed_in_save

pytestmark = pytest.mark.slurm
TEXT = [str(CHECKOUT / f"megatron_ext/data/corpus/shipped/{n}.jsonl") for n in ("en-tech", "code")]


@pytest.fixture(scope="module")
def by_hand(lab: Lab) -> Run:
    """A run queued with sbatch itself, from a checkout that nobody edited."""
    run = lab.run("byhand")
    words = [w for w in run.overrides if not w.startswith("slurm.nodes")]
    template = str(CHECKOUT / "slurm" / "train.sbatch")
    lab.cluster.slurm(
        *("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0"),
        *("--job-name=byhand", f"--chdir={CHECKOUT}", f"--output={lab.folder}/byhand.out"),
        *(template, *words),
    )
    run.wait_gone(seconds=400)
    assert run.attempts(), (lab.folder / "byhand.out").read_text()
    return run


def test_sbatch_with_overrides_trains_to_the_end(lab: Lab, by_hand: Run) -> None:
    assert by_hand.step() == STEPS
    assert lab.check(by_hand) == []


def test_a_killed_rank_costs_no_queue_and_changes_no_loss(lab: Lab, by_hand: Run) -> None:
    run = lab.run("killed", f"watch.drill=[{{kind:kill,rank:1,step:{INTERVAL + 8}}}]").submit()
    run.wait_step(INTERVAL + 2, seconds=400)
    _listens_on_loopback_only(run)
    run.wait_truth("finished", "given up", seconds=400)
    run.wait_gone()
    assert lab.check(run, causes=["process"]) == []
    assert len(run.attempts()) == 1


def test_ranks_that_die_in_a_background_save_leave_the_checkpoint_before_it(lab: Lab) -> None:
    assert killed_in_save(lab, "insave") == []


def _listens_on_loopback_only(run: Run) -> None:
    """No process of the run listens on an address that others can reach."""
    pids = {*run.pids("n1", 0), *run.pids("n2", 1)}
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    table = Path("/proc/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in table]
    open_to = {row[1] for row in rows if row[3] == "0A" and row[9] in sockets}
    assert {address.split(":")[0] for address in open_to} <= {"0100007F"}, open_to


def test_no_token_of_the_submitting_shell_is_kept_anywhere(lab: Lab, by_hand: Run) -> None:
    done = subprocess.run(
        ["grep", "-rl", TOKEN, str(by_hand.folder), f"{lab.cluster.folder}/c"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""


def test_wrong_configurations_never_reach_a_second_attempt(lab: Lab) -> None:
    assert wrong_config(lab, "wrong") == []


def test_a_job_that_waits_says_why_and_can_be_taken_back(lab: Lab) -> None:
    lab.cluster.slurm("scontrol", "update", "NodeName=n3", "State=DRAIN", "Reason=test")
    try:
        run = lab.run("waits", "batch.global_batch_size=3", nodes=3).submit()
        run.wait(lambda: run.status()["truth"] == "waiting", seconds=30, what="waiting")
        assert run.status()["cause"]
        done = run.cluster.python("launch.submit", *run.overrides)
        assert done.returncode == 2
        assert "has not ended" in done.stderr
        run.cluster.python("launch.stop", str(run.folder))
        run.wait_gone()
    finally:
        lab.cluster.slurm("scontrol", "update", "NodeName=n3", "State=RESUME")


def test_slurm_is_asked_and_nothing_is_queued_by_test_only(lab: Lab) -> None:
    run = lab.run("asked")
    assert run.cluster.python("launch.submit", "--test-only", *run.overrides).returncode == 0
    too_many = lab.run("asked", nodes=9)
    assert run.cluster.python("launch.submit", "--test-only", *too_many.overrides).returncode
    assert not run.folder.exists()


def test_an_array_that_slurm_would_refuse_is_refused_before_it_is_composed(lab: Lab) -> None:
    run = lab.run("array")
    words = ("--multirun", "--most-runs=2000", *run.overrides, "seed=range(0,1500)")
    done = run.cluster.python("launch.submit", *words)
    assert done.returncode == 2
    assert done.stderr.endswith(
        "--multirun asks for 1,500 runs in one array, and Slurm takes 1,001 here (MaxArraySize in "
        "slurm.conf): submit them in 2 parts.\n"
    )
    assert not list(lab.folder.glob("array*"))


def test_a_chain_goes_from_text_to_an_exported_and_evaluated_model(
    lab: Lab, tmp_path: Path
) -> None:
    tokenizer, data = tmp_path / "t.model", tmp_path / "data"
    run = lab.run("chained")
    words = [w for w in run.overrides if not w.startswith(("data.sources", "phases"))]
    words += [f"data.sources.all={{path:{data}/all}}", "model.vocab_size=1000"]
    words += ["phases=[{tokens:1024,mixture:{all:1.0}}]"]
    train = ["--vocab-size", "1000", "--out", str(tokenizer)]
    index = ["--tokenizer", str(tokenizer), "--out", str(data), "--merge", "all"]
    score = [str(run.folder), "--data", f"{data}/all", "--tokens", "500"]
    steps: list[dict[str, Any]] = [
        {"name": "tokenizer", "tool": "tools.train_tokenizer", "args": [*TEXT, *train]},
        {"name": "prepare", "tool": "tools.prepare", "args": [*TEXT, *index]},
        {"name": "train", "train": words},
        {
            "name": "convert",
            "tool": "tools.convert",
            "args": ["megatron-to-hf", str(run.folder), str(tmp_path / "hf")],
        },
        {
            "name": "evaluate",
            "tool": "tools.evaluate",
            "args": [*score, "--out", str(tmp_path / "scores.json")],
            "after": ["train"],
        },
    ]
    (tmp_path / "chain.yaml").write_text(json.dumps({"cluster": "loopback", "steps": steps}))
    done = lab.cluster.python("launch.chain", str(tmp_path / "chain.yaml"))
    assert done.returncode == 0, done.stderr
    jobs = [line.split()[1].rstrip(":") for line in done.stdout.splitlines()]
    ended = "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT"

    def facts(job: str) -> str:
        return lab.cluster.slurm("scontrol", "-o", "show", "job", job)

    run.wait(
        lambda: all(any(f"JobState={word}" in facts(job) for word in ended) for job in jobs),
        seconds=400,
        what="the end of the chain",
    )
    assert [job for job in jobs if "JobState=COMPLETED" not in facts(job)] == []
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["checkpoint"].startswith(str(run.folder))
    assert 0 < scores["domains"]["all"]["loss"] < 10


def test_what_follows_a_failed_step_of_a_chain_never_starts(lab: Lab, tmp_path: Path) -> None:
    chain = tmp_path / "chain.yaml"
    chain.write_text(
        "cluster: loopback\nsteps:\n"
        "- {name: fails, tool: tools.prepare, args: [/nonexistent, /nonexistent]}\n"
        "- {name: behind, tool: tools.doctor}\n"
    )
    done = lab.cluster.python("launch.chain", str(chain))
    assert done.returncode == 0, done.stderr
    second = done.stdout.splitlines()[1].split()[1].rstrip(":")
    run = lab.run("chain")
    run.wait(
        lambda: "CANCELLED" in lab.cluster.slurm("scontrol", "show", "job", second),
        seconds=90,
        what="the end of the successor",
    )


def test_one_run_of_an_array_is_looked_at_and_stopped_by_itself(lab: Lab) -> None:
    run = lab.run("arr", steps=2000, nodes=1)
    words = [w for w in run.overrides if not w.startswith("seed=")]
    words += ["batch.global_batch_size=2", "slurm.array_limit=1", "seed=1,2"]
    done = run.cluster.python("launch.submit", "--multirun", *words)
    assert done.returncode == 0, done.stderr
    first, second = (Run(run.cluster, Path(f"{run.folder}-{k}"), words) for k in (0, 1))
    first.wait_step(2, seconds=400)
    assert (first.status()["truth"], second.status()["truth"]) == ("running", "waiting")
    assert second.status()["job_id"] == second.job_id == first.job_id.replace("_0", "_1")
    done = run.cluster.python("launch.stop", str(second.folder))
    assert done.stdout == f"job {second.job_id} cancelled\n"
    assert run.cluster.python("launch.stop", str(first.folder)).returncode == 0
    first.wait_gone(seconds=400)
    assert (first.status()["truth"], second.status()["truth"]) == ("stopped", "stopped")
    assert second.attempts() == []

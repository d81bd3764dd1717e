"""A job becomes one exact sbatch command, and nothing typed reaches a shell."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import sbatch
from launch.cluster_config import ClusterConfig, SlurmConfig
from launch.compose import choices, compose
from launch.config import JobConfig
from launch.site import asked_nodes, world_size
from launch.submit import code_version, prepare, record

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["name=small", "model=llama_tiny", "phases=[{tokens:4096}]", "data.synthetic=true"]
SMALL += ["batch.seq_length=64"]
HOSTILE = ["x; touch X", "$(touch X)", "`touch X`", "x\n#SBATCH --uid=0", "-x", "a b", "../../x"]


def _job(*more: str) -> JobConfig:
    return compose([*SMALL, *more])


@pytest.mark.parametrize("cluster", choices("cluster"))
def test_every_cluster_file_gives_a_command_of_plain_options(cluster: str) -> None:
    job = _job(f"cluster={cluster}", "slurm.nodes=2")
    job.cluster.check()
    words = sbatch.sbatch_command(job, Path("/runs/small"))
    assert words[0] == "sbatch"
    assert "--nodes=2" in words
    assert words[-2:] == [str(sbatch.TEMPLATE), "/runs/small/config.yaml"]
    assert all(w.startswith("--") for w in words[1:-2])


def test_what_a_cluster_file_says_is_asked_for() -> None:
    job = _job("cluster=plain", "slurm.nodes=4", "slurm.time=1:00:00", "slurm.exclude=[n7,n9]")
    job.cluster.options = {"reservation": "week40"}
    words = sbatch.options(job, Path("/r"))
    for want in (
        "--partition=gpu",
        "--gpus-per-node=8",
        "--ntasks-per-node=8",
        "--exclusive",
        "--time=1:00:00",
        "--exclude=n7,n9",
        "--signal=B:USR2@300",
        "--reservation=week40",
    ):
        assert want in words


def test_only_listed_variables_are_handed_over() -> None:
    export = next(w for w in sbatch.options(_job(), Path("/r")) if w.startswith("--export="))
    assert "ALL" not in export
    assert "TOKEN" not in export
    header = (ROOT / "slurm" / "train.sbatch").read_text()
    listed = re.search(r"^#SBATCH --export=(.*)$", header, re.M)
    assert listed is not None
    assert listed[1].split(",") == list(sbatch.EXPORT)


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_are_refused_before_they_reach_slurm(value: str) -> None:
    with pytest.raises(ValueError, match="cluster"):
        ClusterConfig(partition=value).check()
    with pytest.raises(ValueError, match="slurm"):
        SlurmConfig(exclude=[value]).check()
    with pytest.raises(ValueError, match="slurm"):
        SlurmConfig(dependency=value).check()


@pytest.mark.parametrize("value", ["90", "7:99", "1:00:00", "1-2", "1-2:3", "1-2:3:4", "INFINITE"])
def test_what_slurm_takes_as_a_time_limit_is_taken(value: str) -> None:
    SlurmConfig(time=value).check()


@pytest.mark.parametrize("value", ["1:2:3:4", "7:", "abc", "1.5", "1-1:1:1:1", " 5", "7h", "-5"])
def test_what_slurm_refuses_as_a_time_limit_is_refused_by_a_dry_run(value: str) -> None:
    with pytest.raises(ValueError) as refusal:
        prepare([*SMALL, f"slurm.time='{value}'"])
    assert str(refusal.value) == (
        f"slurm.time={value!r} is no time limit of Slurm's: write M (minutes), M:S, H:M:S, D-H, "
        "D-H:M, D-H:M:S or UNLIMITED."
    )


@pytest.mark.parametrize("key", ["constraint", "memory", "venv", "container", "time"])
def test_a_line_break_in_a_word_for_sbatch_is_refused(key: str) -> None:
    for value in ("x\n#SBATCH --uid=0", "-x"):
        with pytest.raises(ValueError, match=f"cluster.{key}"):
            ClusterConfig(**{key: value}).check()
        with pytest.raises(ValueError, match=r"cluster\.options"):
            ClusterConfig(options={"comment": value}).check()


def test_no_text_of_a_user_becomes_a_directive(tmp_path: Path) -> None:
    folder = tmp_path / "a\n#SBATCH --uid=0\ntouch X; $(touch X)"
    job = _job()
    job.cluster.modules = ["m\n#SBATCH --uid=0"]
    record(job, folder, sbatch.sbatch_command(job, folder))
    for name in ("submit.sh", "setup.sh"):
        text = (folder / name).read_text()
        subprocess.run(["bash", "-n", folder / name], check=True)
        # Whatever lines there are, sbatch reads directives of the batch file alone, which is ours.
        assert name != "submit.sh" or shlex.split(text.split("\n", 2)[2])[-2] == str(
            sbatch.TEMPLATE
        )
    options = sbatch.options(job, folder)
    assert all(word.startswith("--") for word in options)
    assert not any(word.startswith(("--uid", "--mail")) for word in options)


def test_a_hostile_name_is_refused() -> None:
    with pytest.raises(ValueError, match="name"):
        prepare([*SMALL, "name='$(touch X)'"])


def test_options_that_are_set_elsewhere_and_secrets_are_refused() -> None:
    for name in ("uid", "export", "wrap", "nodes"):
        with pytest.raises(ValueError, match=f"cluster.options.{name}"):
            ClusterConfig(options={name: "x"}).check()
    with pytest.raises(ValueError, match=r"cluster\.env\.HF_TOKEN looks like a secret"):
        ClusterConfig(env={"HF_TOKEN": "hf_x"}).check()


def test_the_set_up_file_quotes_what_it_is_given(tmp_path: Path) -> None:
    job = _job()
    job.cluster.modules = ["cuda/12.8", f"x; touch {tmp_path}/X", f"$(touch {tmp_path}/X)"]
    (tmp_path / "setup.sh").write_text(sbatch.setup(job))
    subprocess.run(
        ["bash", "-c", 'module() { echo "$2"; }; . "$1"', "bash", tmp_path / "setup.sh"], check=True
    )
    assert not (tmp_path / "X").exists()


def test_the_run_folder_holds_config_command_and_code_and_is_private(tmp_path: Path) -> None:
    job = _job(f"run_dir={tmp_path}/run")
    words = sbatch.sbatch_command(job, tmp_path / "run")
    record(job, tmp_path / "run", words)
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0
    script = (tmp_path / "run" / "submit.sh").read_text()
    assert shlex.split(script.splitlines()[-1]) == words
    assert set(code_version()) == {"commit", "changes"}
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_run_folder_that_others_may_write_or_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    for name in ("open", "link"):
        with pytest.raises(ValueError, match="private"):
            record(_job(), tmp_path / name, ["sbatch"])


def test_a_dry_run_prints_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.submit", "--dry-run", *SMALL, f"run_dir={tmp_path}/run"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout)[0] == "sbatch"
    assert not (tmp_path / "run").exists()


def test_a_misspelt_key_ends_with_one_sentence_and_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.submit", *SMALL, "optimizer.lrr=1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "optimizer.lrr" in done.stderr


@pytest.mark.parametrize("name", ["train.sbatch", "task.sbatch"])
def test_batch_files_are_sound_bash(name: str) -> None:
    path = ROOT / "slurm" / name
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)
    text = path.read_text()
    assert not re.search(r"^\s*(eval|set -\w*x)\b", text, re.M)


def test_help_answers_in_well_under_a_second() -> None:
    for name in ("submit", "status", "stop", "resume", "chain", "health", "attempt"):
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", f"launch.{name}", "--help"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        after = os.times()
        used = after.children_user + after.children_system
        used -= before.children_user + before.children_system
        assert used < 1.0, f"{name}: {used:.2f} s"


def test_plan_and_submission_count_the_same_nodes() -> None:
    words = ["recipe=skywork_13b/stage1", "cluster=a800_512"]
    assert world_size(compose(words)) == 512
    with pytest.raises(ValueError, match=r"slurm\.nodes is not given, and cluster=a800_512 has 64"):
        prepare(words)
    for nodes in (1, 64):
        job = _job("cluster=a800_512", f"slurm.nodes={nodes}")
        assert (asked_nodes(job), world_size(job)) == (nodes, 8 * nodes)
        assert f"--nodes={nodes}" in sbatch.options(job, Path("/r"))
    assert asked_nodes(_job("cluster=plain")) == asked_nodes(_job()) == 1


def test_an_array_asks_one_thing_of_the_cluster() -> None:
    from launch.submit import submit_array

    words = ["recipe=quickstart", "cluster=loopback", "slurm.nodes=2,4", "batch.micro_batch_size=1"]
    with pytest.raises(ValueError, match="the same for all runs of one array"):
        submit_array(words, dry_run=True, test_only=False, most=1000)


def test_a_million_runs_are_refused_before_one_of_them_is_written_out() -> None:
    from launch.compose import sweep

    begun = time.monotonic()
    with pytest.raises(ValueError) as refusal:
        sweep(["recipe=quickstart", "seed=range(0,1000000000)", "optimizer.lr=1e-4,2e-4"], most=9)
    assert str(refusal.value) == (
        "--multirun asks for 1,000,000,000 of seed * 2 of optimizer.lr = 2,000,000,000 runs, above "
        "--most-runs=9: give fewer values, or raise --most-runs."
    )
    assert time.monotonic() - begun < 5
    runs = sweep(["seed=range(0,9,4)", "recipe=quickstart", "optimizer.lr=1,2"], most=6)
    assert runs[:2] == [["seed=0", "recipe=quickstart", f"optimizer.lr={lr}"] for lr in (1, 2)]
    assert len(runs) == 6
    with pytest.raises(ValueError, match=r"cannot be read"):
        sweep(["seed=interval(0,1)"], most=6)
    for words, says in (
        (["seed=range(0,1000000000)", "seed=1,2"], "seed is given more than once"),
        (["seed=1,2", "seed=3"], "seed is given more than once"),
        (["seed=range(0,10,0)"], "step 0 has no end"),
        (["seed=range(0,10,-1)"], "asks for no run"),
        (["recipe=glob(*)"], "write the choices out"),
    ):
        with pytest.raises(ValueError, match=says):
            sweep(words, most=6)

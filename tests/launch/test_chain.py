"""A chain queues jobs that can start, in their order, each with the set-up of its site."""

import subprocess
from pathlib import Path

import pytest

from launch import chain
from tests.launch.slurm_programs import Slurm
from tests.launch.test_submit import ROOT, SMALL


def test_a_chain_orders_its_jobs_and_names_what_could_never_start(tmp_path: Path) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text(
        "cluster: loopback\nsteps:\n"
        "- {name: prepare, tool: tools.prepare, args: [in, out]}\n"
        f"- {{name: fit, train: {[*SMALL, f'run_dir={tmp_path}/run']}}}\n"
        "- {name: convert, tool: tools.convert, args: [x], after: [fit]}\n"
    )
    cluster, steps = chain.read(path)
    assert [step.after for step in steps] == [[], ["prepare"], ["fit"]]
    words = chain.command(steps[2], {"fit": "12"}, chain.bare(cluster), tmp_path / "convert")
    assert "--dependency=afterok:12" in words
    assert "--kill-on-invalid-dep=yes" in words
    for wrong, says in (
        ("- {name: a, tool: tools.prepare, after: [b]}", "never start"),
        ("- {name: a, tool: os.system}", "not a program of tools"),
        ("- {name: 'a; x', tool: tools.prepare}", "plain word"),
        ("- {name: a}", "either tool or train"),
        (
            "- {name: a, tool: tools.nosuch}",
            r"steps.a.tool=tools.nosuch is not known.*tools.prepare",
        ),
        ("- {name: a, tool: tools.drills.lab}", "is not known"),
        ("- {name: a, tool: tools.prepare, args: 5}", r"steps.a.args=5 is no list"),
        (
            "- {name: a, tool: tools.prepare, options: [x]}",
            r"steps.a.options=\['x'\] is no mapping",
        ),
        ("- {name: a, tool: tools.prepare, after: b}", r"steps.a.after='b' is no list"),
        ("- {name: a, train: recipe=quickstart}", "is no list"),
        ("- {name: a", "is no YAML"),
    ):
        path.write_text(f"steps:\n{wrong}\n")
        with pytest.raises(ValueError, match=says):
            chain.read(path)


def test_a_chain_queues_nothing_over_a_live_run_and_each_tool_with_the_sites_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = Slurm(tmp_path / "slurm", monkeypatch)
    monkeypatch.chdir(tmp_path)
    fit = f"{{name: fit, train: {[*SMALL, f'run_dir={tmp_path}/run']}}}"
    prepare_ = "{name: prepare, tool: tools.prepare, args: [a b], options: {cpus-per-task: 7}}"
    (tmp_path / "chain.yaml").write_text(f"cluster: container\nsteps:\n- {prepare_}\n- {fit}\n")
    steps = chain.read(tmp_path / "chain.yaml")[1]
    chain.queue_all("container", steps, dry_run=True)
    first, second = capsys.readouterr().out.splitlines()
    assert "--cpus-per-task=7" in first and not (tmp_path / "runs").exists()
    assert "--dependency=afterok:prepare" in second
    assert chain.queue_all("container", steps, dry_run=False) == {"prepare": "77", "fit": "77"}
    (tmp_path / "run" / "job").write_text("12\n")
    slurm.knows("RUNNING", tmp_path / "run")
    with pytest.raises(ValueError, match="folder of job 12, which has not ended"):
        chain.queue_all("container", steps, dry_run=False)
    assert len(slurm.told("sbatch")) == 2

    # The batch file as Slurm would run it, in an image of pyxis.
    (folder,) = (tmp_path / "runs" / "tasks").glob("prepare-*")
    assert slurm.told("sbatch")[0].endswith(f"slurm/task.sbatch {folder} tools.prepare a b")
    (folder / "setup.sh").write_text((folder / "setup.sh").read_text() + "export SITE=here\n")
    slurm.program("srun", f'echo "$SITE" "$@" > {tmp_path}/ran')
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(ROOT))
    batch = ["bash", str(chain.TASK), str(folder), "tools.prepare", "a b"]
    subprocess.run(batch, check=True)
    image = chain.bare("container").cluster.container
    ran = (tmp_path / "ran").read_text()
    assert ran.startswith(f"here --container-image={image} ")
    assert ran.endswith("python -m tools.prepare a b\n")
    subprocess.run([*batch[:2], *batch[3:]], check=True)
    assert (tmp_path / "ran").read_text() == " python -m tools.prepare a b\n"  # by hand

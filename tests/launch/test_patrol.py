"""A node that breaks while a run is under way is found by a process of its own, and named."""

import sys
import time
from pathlib import Path

import pytest

from launch.attempt import begin
from launch.health import bad_nodes
from launch.patrol import Patrol
from megatron_ext.resilience.classify import Evidence, classify
from tests.launch.test_attempt import ENVIRON, SMALL

XID = "NVRM: Xid (PCI:0000:3b:00): 79, pid=7, GPU has fallen off the bus.\n"


def _until(patrol: Patrol, *, seconds: float = 60.0) -> str:
    end = time.monotonic() + seconds
    while not (why := patrol()) and time.monotonic() < end:
        time.sleep(0.02)
    return why


def test_what_the_kernel_says_during_a_run_sets_the_node_aside(tmp_path: Path) -> None:
    log = tmp_path / "kern.log"
    log.write_text("all is well\n")
    folder = begin([*SMALL, f"run_dir={tmp_path}/run", f"cluster.kernel_log={log}"], ENVIRON)
    patrol = Patrol(folder, "n5", interval=0.01)
    assert _until(patrol, seconds=3.0) == ""
    assert bad_nodes(folder) == {}
    log.write_text(XID)
    assert "Xid" in _until(patrol)
    assert list(bad_nodes(folder)) == ["n5"]
    failure = classify(Evidence(bad_nodes=bad_nodes(folder), took_steps=True))
    assert (failure.name, failure.suspects) == ("gpu", ("n5",))
    patrol.close()


@pytest.mark.parametrize("code", ["raise SystemExit(2)", "1 / 0", "import time; time.sleep(60)"])
def test_a_check_that_fails_itself_says_nothing_about_the_node(tmp_path: Path, code: str) -> None:
    folder = begin([*SMALL, f"run_dir={tmp_path}/run"], ENVIRON)
    patrol = Patrol(folder, "n5", interval=0.01)
    patrol._words = [sys.executable, "-c", code]
    assert _until(patrol, seconds=1.5) == ""
    patrol.close()
    assert bad_nodes(folder) == {}


def test_a_full_disk_blames_no_node() -> None:
    why = "/runs/a: No space left on device: 3 MiB free, 1024 MiB are needed"
    failure = classify(Evidence(bad_nodes={"n1": why, "n2": why}))
    assert (failure.name, failure.suspects) == ("storage", ())

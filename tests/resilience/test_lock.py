"""Two local runs in one folder: the second is refused before it touches anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.resilience import lock

ROOT = Path(__file__).parents[2]


def test_the_second_is_refused_by_the_name_of_the_first(tmp_path):
    with lock.held(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()} on .*stop"):
        with lock.held(tmp_path):
            pass
    with lock.held(tmp_path):
        pass


def test_ranks_that_outlive_their_parent_keep_the_folder(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from megatron_ext.resilience import lock\n"
        "with lock.held(Path(sys.argv[1])):\n"
        "    if os.fork() == 0: sys.stdin.read(); os._exit(0)\n"
        "    print('held', flush=True); os._exit(0)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as first:
        assert first.stdin and first.stdout and first.stdout.readline() == "held\n"
        first.wait()
        with pytest.raises(ValueError, match="is being trained by"), lock.held(tmp_path):
            pass
        first.stdin.close()  # the fork reads its end and goes
        first.stdout.read()
    with lock.held(tmp_path):
        pass


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / lock.NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="cannot be opened"), lock.held(tmp_path):
        pass
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_look_at_the_lock_writes_nothing(tmp_path):
    lock.check_free(tmp_path)
    assert not (tmp_path / lock.NAME).exists()
    (tmp_path / lock.NAME).write_text("process 7 on elsewhere\n")
    lock.check_free(tmp_path)
    assert (tmp_path / lock.NAME).read_text() == "process 7 on elsewhere\n"
    with lock.held(tmp_path), pytest.raises(ValueError, match="is being trained by process"):
        lock.check_free(tmp_path)

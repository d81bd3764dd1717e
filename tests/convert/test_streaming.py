"""Memory stays within the budget, a failure stops the rest, a kill leaves nothing to mistake."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from megatron_ext.checkpoint.folder import verify
from megatron_ext.convert.to_huggingface import to_huggingface
from megatron_ext.convert.to_megatron import to_megatron
from megatron_ext.convert.workers import run_all
from tests.convert.models import make


def test_bytes_in_flight_stay_within_the_budget_or_stand_alone():
    held, most, lock = [], [], threading.Lock()

    def work(size):
        with lock:
            held.append(size)
            most.append(list(held))
        time.sleep(0.001)
        with lock:
            held.remove(size)

    sizes = [30, 80, 250, 10, 60, 60, 60, 120, 5, 5] * 4
    run_all(sizes, work, cost=lambda size: size, workers=4, budget=100)
    assert all(sum(now) <= 100 or len(now) == 1 for now in most)
    assert max(map(len, most)) > 1


def test_the_first_failure_is_raised_and_the_rest_is_not_begun():
    begun = []

    def work(number):
        begun.append(number)
        if number == 3:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_all(list(range(100)), work, cost=lambda number: 1, workers=1)
    assert begun == [0, 1, 2, 3]


def die_half_way(convert, source, target):
    def progress(done, total):
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGKILL)

    convert(source, target, workers=1, progress=progress)


@pytest.mark.parametrize("convert", [to_megatron, to_huggingface])
def test_a_killed_conversion_leaves_nothing_to_mistake_and_can_be_run_again(convert, tmp_path):
    source = make("llama", tmp_path / "hf")
    if convert is to_huggingface:
        to_megatron(source, tmp_path / "ckpt")
        source = tmp_path / "ckpt"
    target = tmp_path / "out"
    child = multiprocessing.get_context("fork").Process(
        target=die_half_way, args=(convert, source, target)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not target.exists() and (tmp_path / ".out.unfinished").exists()
    convert(source, target)
    assert not (tmp_path / ".out.unfinished").exists()
    if convert is to_megatron:
        verify(target)


def test_two_conversions_do_not_write_one_target(tmp_path):
    source = make("tied", tmp_path / "hf")

    def progress(done, total):
        with pytest.raises(FileExistsError, match="another program is writing"):
            to_megatron(source, tmp_path / "out")

    to_megatron(source, tmp_path / "out", workers=1, progress=progress)
    verify(tmp_path / "out")

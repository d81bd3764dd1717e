"""Run a function on several CPU ranks, each a fork of this process."""

import faulthandler
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_ext.devices import device
from megatron_ext.parallel.env import Env
from megatron_ext.resilience.config import WatchConfig

if TYPE_CHECKING:
    from megatron_ext.resilience.watcher import Watcher


class RankFailure(AssertionError):
    """What the first failing rank said, traceback included."""


def run_on_ranks(
    fn: Callable[..., None], *args: Any, world_size: int, timeout: float = 120.0
) -> None:
    """Call ``fn(*args)`` on ``world_size`` forked ranks; the first failure is raised here.

    Ranks meet through a file (``MEETING`` in their environment, which ``env()`` and ``meeting()``
    read), so that parallel tests never fight over a port, and are forked, so that they inherit
    what is already imported. No process group exists until ``fn`` starts one.

    Raises:
        RankFailure: the earliest exception of any rank, or ranks that outlived ``timeout`` seconds.
    """
    device.start()
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        ranks = [
            fork.Process(target=_rank_main, args=(rank, world_size, folder, timeout, fn, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        alive = _join(ranks, timeout + 1.0)
        failures = sorted(Path(folder).glob("failure.*"), key=lambda file: file.stat().st_mtime_ns)
        if failures:
            raise RankFailure(failures[0].read_text())
        if alive:
            stacks = "\n".join((Path(folder) / f"stacks.{rank}").read_text() for rank in alive)
            raise RankFailure(f"ranks {alive} were still running after {timeout:g} s:\n{stacks}")
    codes = {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode}
    if codes:
        raise RankFailure(f"ranks died without a word; exit codes by rank: {codes}")


class Ended(NamedTuple):
    """How a watcher came to its end."""

    code: int
    cpu_seconds: float
    """Its own and its rank's."""


def run_under_watchers(
    folder: Path,
    task: "Callable[[Watcher, int], int]",
    *,
    world_size: int,
    watch: WatchConfig,
    first_seconds: float = 60.0,
) -> list[Ended]:
    """Fork ``world_size`` watchers, of nodes n0, n1, ..., over ``task(watcher, port)`` each.

    ``folder`` must be there, and two below the run's. A file ``unfit-RANK`` in it says why that
    node must be left. Ranks are restarted in place without limit; none leaves an outcome.
    """
    pids = []
    for rank in range(world_size):
        if pid := os.fork():
            pids.append(pid)
            continue
        try:
            os._exit(_watch(folder, task, rank, world_size, watch, first_seconds))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    ends = [os.wait4(pid, 0)[1:] for pid in pids]
    return [
        Ended(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime)
        for status, used in ends
    ]


def _watch(
    folder: Path,
    task: "Callable[[Watcher, int], int]",
    rank: int,
    world_size: int,
    watch: WatchConfig,
    first_seconds: float,
) -> int:
    from megatron_ext.resilience.chair import Seat
    from megatron_ext.resilience.watcher import Watcher

    seat = Seat(
        rank=rank,
        world_size=world_size,
        host=f"n{rank}",
        address="127.0.0.1",
        folder=folder,
        first_seconds=first_seconds,
        known_step=-1,
        watch=watch,
    )

    def unfit(path: Path = folder / f"unfit-{rank}") -> str:
        return path.read_text() if path.exists() else ""

    watcher = Watcher(
        seat,
        lambda port: task(watcher, port),
        may_go_on=lambda: True,
        has_outcome=lambda: False,
        unfit=unfit,
    )
    return watcher.run()


def env() -> Env:
    """The rank that this process is; one rank alone outside run_on_ranks."""
    return Env.read()


def meeting() -> str | None:
    """Where the ranks of run_on_ranks meet, as an init_method."""
    return os.environ.get("MEETING")


def _join(ranks: list[Any], timeout: float) -> list[int]:
    """Wait for all ranks; once one fails, give the others 2 s. Returns those that had to go."""
    deadline = time.monotonic() + timeout
    waiting = {process.sentinel: process for process in ranks}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for sentinel in wait(list(waiting), timeout=left):
            process = waiting.pop(sentinel)
            process.join()  # its pipe closes a moment before it can be reaped
            if process.exitcode:
                deadline = min(deadline, time.monotonic() + 2.0)
    late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in late:
        ranks[rank].kill()
        ranks[rank].join()
    return late


def _rank_main(
    rank: int, world_size: int, folder: str, timeout: float, fn: Callable[..., None], args: Any
) -> None:
    import torch

    from megatron_ext.parallel import groups

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MEETING=f"file://{folder}/rendezvous")
    torch.set_num_threads(1)  # or the ranks fight over the cores
    with open(Path(folder) / f"stacks.{rank}", "w") as stacks:
        faulthandler.dump_traceback_later(timeout, file=stacks)
        try:
            with device.expected_warnings():
                fn(*args)
                groups.stop()
        except BaseException:
            aside = Path(folder) / f".failure.{rank}"
            aside.write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
            aside.rename(Path(folder) / f"failure.{rank}")
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()

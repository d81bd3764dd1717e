"""Many tensors at a time, within a memory budget: threads, since the work is copying bytes."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Job = TypeVar("Job")

BUDGET = 768 << 20  # bytes in flight; a larger tensor is handled alone


class Budget:
    """Admits work while the bytes in flight stay below a limit, or when nothing is in flight."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until ``size`` more bytes may be held."""
        with self._changed:
            self._changed.wait_for(lambda: self.held == 0 or self.held + size <= self.limit)
            self.held += size

    def give(self, size: int) -> None:
        """Return what ``take`` was granted."""
        with self._changed:
            self.held -= size
            self._changed.notify_all()


class Progress:
    """Adds up the bytes that threads finish, and tells a listener how many of how many."""

    def __init__(self, total: int, listener: Callable[[int, int], None]) -> None:
        self.total, self.finished, self.listener = total, 0, listener
        self._lock = threading.Lock()

    def __call__(self, size: int) -> None:
        with self._lock:
            self.finished += size
            self.listener(self.finished, self.total)


def run_all(
    jobs: Sequence[Job],
    work: Callable[[Job], None],
    *,
    cost: Callable[[Job], int],
    workers: int,
    done: Callable[[int], None] = lambda size: None,
    budget: int = BUDGET,
) -> None:
    """Do every job on ``workers`` threads; the first failure stops the rest and is raised.

    Args:
        jobs: what to do.
        work: does one.
        cost: bytes of memory that a job needs.
        workers: threads.
        done: told each finished job's bytes, for a progress bar.
        budget: bytes in flight over all threads.
    """
    purse, failed = Budget(budget), threading.Event()

    def one(job: Job) -> None:
        size = cost(job)
        purse.take(size)
        try:
            if not failed.is_set():
                work(job)
                done(size)
        except BaseException:
            failed.set()
            raise
        finally:
            purse.give(size)

    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        futures = [pool.submit(one, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            failed.set()
            raise
        for future in futures:
            future.result()

"""A rank as a forked child: everything slow is imported once, in the parent that outlives it."""

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron_ext.atomic import write_text
from megatron_ext.resilience.stacks import UNKNOWN, Place, place

FORWARDED = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Child:
    """One generation of one rank."""

    def __init__(self, task: Callable[[], int], *, stacks: Path, error: Path) -> None:
        """Fork ``task``. ``stacks``: where SIGUSR1 writes all threads' stacks, even if the
        interpreter is held; ``error``: where its last words go."""
        self._stacks, self._error = stacks, error
        error.unlink(missing_ok=True)
        stacks.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        self.code: int | None = None
        if self.pid == 0:
            self._run(task)

    def _run(self, task: Callable[[], int]) -> None:
        code = 1
        try:
            os.setsid()  # so that what it starts ends with it
            signal.set_wakeup_fd(-1)  # it is the parent's
            for number in (*FORWARDED, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            file = open(self._stacks, "w")  # noqa: SIM115, stays open for faulthandler
            faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
            code = task()
        except BaseException as error:
            traceback.print_exc()
            code = getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1)
            line = traceback.format_exception_only(error)[-1].strip()[:500]
            write_text(self._error, line)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> bool:
        """Whether it lives. Sets ``code``: negative is the signal that ended it."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def signal(self, number: int) -> None:
        """Send a signal, if it lives."""
        if self.poll():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it and everything that it started."""
        if self.poll():
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not reached setsid yet
                os.kill(self.pid, signal.SIGKILL)

    def state(self) -> str:
        """The kernel's letter for it: ``R``, ``S``, ``D``, ``T``, ``Z``; empty when gone."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return ""
        return text.rpartition(")")[2].split()[0]

    def last_words(self) -> str:
        """The exception that ended it, if one did."""
        try:
            return self._error.read_text()[:500]
        except OSError:
            return ""

    def place(self) -> Place:
        """Where its stacks show it."""
        try:
            return place(self._stacks.read_text())
        except OSError:
            return UNKNOWN

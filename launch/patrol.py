"""Looks at this node every few minutes while a run is under way, in a process of its own."""

import logging
import subprocess
import sys
import time
from pathlib import Path

from launch.health import leave_word

log = logging.getLogger(__name__)
PATIENCE_SECONDS = 300.0  # a check that takes longer is ended; it says nothing about the node


class Patrol:
    """Call it often: it never waits, and returns why the node is unfit once that is known."""

    def __init__(self, folder: Path, host: str, *, interval: float) -> None:
        """``folder``: the attempt's, where word is left; ``interval`` in seconds, 0 never looks."""
        self._folder, self._host = folder, host
        self._words = [sys.executable, "-m", "launch.health", str(folder.parents[1]), "--during"]
        self._interval, self._began = interval, time.monotonic()
        self._check: subprocess.Popen[str] | None = None
        self._why = ""

    def __call__(self) -> str:
        """Empty as long as the node is fit, or nothing is known."""
        now = time.monotonic()
        if self._check is None:
            if not self._why and self._interval and now - self._began >= self._interval:
                self._began = now
                self._check = subprocess.Popen(
                    self._words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
        elif self._check.poll() is not None:
            said, _ = self._check.communicate()
            code, self._check = self._check.returncode, None
            self._judge(code, said.strip())
        elif now - self._began > PATIENCE_SECONDS:
            log.warning("the health check did not end within %.0f s", PATIENCE_SECONDS)
            self.close()
        return self._why

    def _judge(self, code: int, said: str) -> None:
        if code == 1 and said:
            self._why = said.splitlines()[-1][:300]
            leave_word(self._folder, self._host, self._why)
        elif code == 3:
            log.warning("health check: %s", said)  # by the next save there may be room again
        elif code:
            log.warning("the health check itself failed with code %d", code)

    def close(self) -> None:
        """End a check that is under way."""
        if self._check is not None:
            self._check.kill()
            self._check.communicate()
            self._check = None

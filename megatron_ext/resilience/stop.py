"""Stop requests: a signal on any rank ends training on all ranks after the same step."""

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_ext.resilience import lease

if TYPE_CHECKING:
    import torch.distributed

CAUSES = {
    signal.SIGUSR2: "time limit",
    signal.SIGTERM: "terminated",
    signal.SIGINT: "interrupted",
}
# In this order of weight: what a person asks for outranks what the scheduler does.
CODES = ("", "time limit", "terminated", "asked to stop", "interrupted", "superseded")
LOOK_SECONDS = 1.0  # between looks at the run folder, which may be on a slow file system


class StopRequest:
    """A flag that signal handlers set and that all ranks read together, once a step."""

    def __init__(self, run_dir: Path | None = None, attempt: str = "") -> None:
        self.cause = ""
        """Why, once ``requested`` has agreed on it; empty before."""
        self._seen = 0
        self._run_dir, self._attempt = run_dir, attempt
        self._looked = -LOOK_SECONDS
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    @classmethod
    def install(
        cls,
        run_dir: Path | None = None,
        *,
        attempt: str = "",
        signals: Iterable[signal.Signals] = CAUSES,
    ) -> "StopRequest":
        """Take over the signals. Main thread only.

        Rank 0 gives ``run_dir``, where launch.stop leaves its request, and ``attempt``, which
        must hold the run's lease.
        """
        request = cls(run_dir, attempt)
        for number in signals:
            request._before[number] = signal.signal(number, request._note)
        return request

    def remove(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # Nothing but a flag: a handler may interrupt any code, a checkpoint write included.
        self._seen = max(self._seen, CODES.index(CAUSES[signal.Signals(number)]))

    def _local(self) -> int:
        if self._run_dir is not None and time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            if stop_file(self._run_dir).exists():
                self._seen = max(self._seen, CODES.index("asked to stop"))
            if self._attempt and lease.holder(self._run_dir) != self._attempt:
                self._seen = CODES.index("superseded")
        return self._seen

    def requested(self, group: "torch.distributed.ProcessGroup | None" = None) -> bool:
        """Whether any rank was asked to stop. Every rank of ``group`` must call this.

        Raises:
            LostLease: a newer copy of the run is at work, so that this one must not save.
        """
        import torch
        import torch.distributed as dist

        code = self._local()
        if dist.is_available() and dist.is_initialized():
            on_gpu = dist.get_backend(group) == "nccl"
            flag = torch.tensor([code], dtype=torch.int32, device="cuda" if on_gpu else "cpu")
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
            code = int(flag.item())
        self.cause = CODES[code]
        if self.cause == "superseded":
            raise lease.LostLease("a newer copy of this run is at work: ending without a save")
        return code > 0


def stop_file(run_dir: Path) -> Path:
    """The file by which launch.stop asks a run to save and end."""
    return run_dir / "stop-requested"

"""Stop requests: a signal on any rank ends training on all ranks after the same step."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed

CAUSES = {
    signal.SIGUSR2: "time limit",
    signal.SIGTERM: "terminated",
    signal.SIGINT: "interrupted",
}
# In this order of weight: what a person asks for outranks what the scheduler does.
CODES = ("", "time limit", "terminated", "asked to stop", "interrupted")


class StopRequest:
    """A flag that signal handlers set and that all ranks read together, once a step."""

    def __init__(self, request_file: Path | None = None) -> None:
        self.cause = ""
        """Why, once ``requested`` has agreed on it; empty before."""
        self._seen = 0
        self._file = request_file
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    @classmethod
    def install(
        cls, request_file: Path | None = None, *, signals: Iterable[signal.Signals] = CAUSES
    ) -> "StopRequest":
        """Take over the signals. Main thread only. ``request_file``: a file asking the same."""
        request = cls(request_file)
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
        if self._file is not None and self._file.exists():
            self._seen = max(self._seen, CODES.index("asked to stop"))
        return self._seen

    def requested(self, group: "torch.distributed.ProcessGroup | None" = None) -> bool:
        """Whether any rank was asked to stop. Every rank of ``group`` must call this."""
        import torch
        import torch.distributed as dist

        code = self._local()
        if dist.is_available() and dist.is_initialized():
            on_gpu = dist.get_backend(group) == "nccl"
            flag = torch.tensor([code], dtype=torch.int32, device="cuda" if on_gpu else "cpu")
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
            code = int(flag.item())
        self.cause = CODES[code]
        return code > 0

"""How long this process has waited in collectives, and in how many."""

import time
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass
class Waits:
    """Since counting began. On NCCL waits are the stream's and take no time here."""

    seconds: float = 0.0
    calls: int = 0
    shown: memoryview | None = None
    """Where the calls are written for another process to see, eight bytes."""


@cache
def waits() -> Waits:
    """The counts of this process; counting begins with the first call.

    Every blocking collective of gloo ends in ``Work.wait``, whoever started it: that one method
    is wrapped, about a microsecond a call.
    """
    from torch._C._distributed_c10d import Work

    counted, plain = Waits(), Work.wait

    def wait(self: Any, *args: Any, **options: Any) -> Any:
        counted.calls += 1
        if counted.shown is not None:
            counted.shown[0] = counted.calls
        began = time.perf_counter()
        try:
            return plain(self, *args, **options)
        finally:
            counted.seconds += time.perf_counter() - began

    Work.wait = wait  # type: ignore[method-assign]
    return counted

"""The parent of one rank: starts it, watches it, and starts it again when all watchers agree."""

import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from megatron_ext.resilience.chair import Chair, Seat, record_event, tick_seconds
from megatron_ext.resilience.child import FORWARDED, Child
from megatron_ext.resilience.council import PEER_SECONDS
from megatron_ext.resilience.deadlines import Deadlines
from megatron_ext.resilience.heartbeat import Heartbeat, now
from megatron_ext.resilience.stacks import UNKNOWN
from megatron_ext.resilience.wire import Peer, wait

BUSY_SECONDS = 0.1  # between looks while the council waits for something
PLACE_SECONDS = 0.5  # for a rank to write its stacks


class Watcher:
    """Watches over one rank. ``task(port)`` is what the rank does, in a forked child."""

    def __init__(
        self,
        seat: Seat,
        task: Callable[[int], int],
        *,
        may_go_on: Callable[[], bool],
        has_outcome: Callable[[], bool],
        unfit: Callable[[], str] = str,
    ) -> None:
        """``unfit``: why this node must be left now, empty as long as it need not be."""
        self.seat, self._task, self._unfit = seat, task, unfit
        self._may_go_on, self._has_outcome = may_go_on, has_outcome
        self._beat = Heartbeat()
        self._deadlines = Deadlines(seat.watch)
        self._child: Child | None = None
        self._generation = -1
        self._asked: list[int] = []
        self._chair: Chair | None = None
        self._place = UNKNOWN
        self._stacks_at = self._due = 0.0
        self._ping: tuple[float, float] | None = None

    @property
    def heartbeat(self) -> Heartbeat:
        """The page that the rank writes; inherited by the fork."""
        return self._beat

    @property
    def generation(self) -> int:
        """Which start of the rank it is; 0 is the first."""
        return self._generation

    def run(self) -> int:
        """Until the end of the attempt; returns the code to exit with."""
        before = {n: signal.signal(n, self._note) for n in (*FORWARDED, signal.SIGCHLD)}
        self._bell, ring = socket.socketpair()
        self._bell.setblocking(False)
        ring.setblocking(False)
        signal.set_wakeup_fd(ring.fileno())  # a signal ends the wait for messages
        try:
            if self.seat.rank == 0:
                self._chair = Chair(self.seat)
            self._link = self._join()
            return self._loop()
        finally:
            if self._child is not None:
                self._child.kill()
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._bell.close()
            ring.close()
            with contextlib.suppress(OSError):
                for path in self.seat.folder.glob(f"rank-{self.seat.rank}.*.stacks"):
                    if not path.stat().st_size:
                        path.unlink()

    def _note(self, number: int, _frame: Any) -> None:
        if number == signal.SIGCHLD:
            self._due = 0.0  # the others are told at once
        else:
            self._asked.append(number)

    def _join(self) -> Peer:
        """Connect to rank 0's watcher.

        Raises:
            TimeoutError: it gave no address, or none that answers, in time.
        """
        end = now() + self.seat.first_seconds
        while now() < end:
            try:
                note = json.loads((self.seat.folder / "council.json").read_text())
                connection = socket.create_connection((note["host"], note["port"]), timeout=5)
                return Peer(connection, note["token"])
            except (OSError, ValueError):
                time.sleep(0.1)
        raise TimeoutError(f"no first heartbeat from rank 0 within {self.seat.first_seconds:.0f} s")

    def _loop(self) -> int:
        heard = now()
        while True:
            self._pass_signals()
            if now() >= self._due:
                self._due = now() + tick_seconds(self.seat.world_size)
                self._link.send(self._status())
            if self._chair is not None:
                self._chair.preside(self._may_go_on(), self._has_outcome)
            for message in self._link.receive():
                heard = now()
                if (code := self._obey(message)) is not None:
                    return code
            if self._link.broken or now() - heard > PEER_SECONDS:
                lost = {"class": "node", "rank": "0", "headline": "rank 0's node is lost"}
                record_event(self.seat.folder, lost)
                return 1
            wait([self._bell, *self._sockets()], self._patience())
            with contextlib.suppress(BlockingIOError):
                self._bell.recv(4096)

    def _patience(self) -> float:
        """Seconds to wait for messages and signals."""
        if self._chair is not None and not self._chair.calm:
            return BUSY_SECONDS
        return max(0.0, self._due - now())

    def _sockets(self) -> list[Any]:
        """What this process waits on, and a rank must not inherit."""
        return [self._link, *(self._chair.sockets() if self._chair is not None else ())]

    def _pass_signals(self) -> None:
        while self._asked and self._child is not None:
            self._child.signal(self._asked.pop(0))

    def _status(self) -> dict[str, Any]:
        child, beat = self._child, self._beat.read()
        alive = child is not None and child.poll()
        self._deadlines.observe(beat)
        late = 0.0
        if alive and self.seat.watch.hang and beat.count:
            late_at = beat.at + self._deadlines.seconds(beat)
            late = now() - beat.at if now() > late_at else 0.0
            self._due = min(self._due, late_at) if not late else self._due
        if self._stacks_at and child is not None and now() - self._stacks_at > PLACE_SECONDS:
            self._place, self._stacks_at = child.place(), 0.0
        sent, came = self._ping or (0.0, 0.0)
        return {
            "rank": self.seat.rank,
            "host": self.seat.host,
            "generation": self._generation,
            "alive": alive,
            "code": child.code if child is not None else None,
            "step": beat.step,
            "count": beat.count,
            "section": beat.section,
            "overdue": late,
            "process": child.state() if alive and child is not None else "",
            "error": child.last_words() if child is not None and not alive else "",
            "calls": beat.calls,
            "call": self._place.call,
            "frame": self._place.frame,
            "unfit": self._unfit(),
            "ping": sent,
            "held": now() - came,
        }

    def _obey(self, order: dict[str, Any]) -> int | None:
        verb = order["verb"]
        if verb == "end":
            if self._child is not None:
                self._child.kill()
            return int(order["code"])
        if verb == "start":
            self._start(int(order["generation"]), int(order["port"]))
        elif verb == "ping":
            self._ping = float(order["at"]), now()
        elif verb == "kill" and self._child is not None:
            self._child.kill()
        elif verb == "stacks" and self._child is not None:
            self._stacks_at = now()
            self._due = now() + PLACE_SECONDS + 0.01
            self._child.signal(signal.SIGUSR1)
        return None

    def _start(self, generation: int, port: int) -> None:
        self._generation = generation
        self._beat.clear()
        self._beat.enter("start")
        self._place = UNKNOWN
        sockets = self._sockets()

        def task() -> int:
            for inherited in sockets:
                inherited.close()
            return self._task(port)

        name = f"rank-{self.seat.rank}"
        self._child = Child(
            task,
            stacks=self.seat.folder / f"{name}.{generation}.stacks",
            error=self.seat.folder / f"{name}.{generation}.error",
        )

"""The parent of one rank: starts it, watches it, and starts it again when all watchers agree."""

import contextlib
import json
import logging
import secrets
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext.atomic import write_text
from megatron_ext.resilience.child import FORWARDED, Child
from megatron_ext.resilience.config import WatchConfig
from megatron_ext.resilience.council import PEER_SECONDS, Council, Order
from megatron_ext.resilience.deadlines import Deadlines
from megatron_ext.resilience.heartbeat import Heartbeat, now
from megatron_ext.resilience.links import Links
from megatron_ext.resilience.stacks import UNKNOWN
from megatron_ext.resilience.stragglers import Straggler, record
from megatron_ext.resilience.wire import Peer, free_port, listen

log = logging.getLogger(__name__)
TICK_SECONDS = 0.1
ALIVE_SECONDS = 10.0  # between signs on disk, for launch.observe


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where this watcher sits."""

    rank: int
    world_size: int
    host: str
    address: str
    """Name or address of rank 0's node."""

    folder: Path
    """RUN_DIR/attempts/NAME, shared by all nodes."""

    first_seconds: float
    known_step: int
    watch: WatchConfig


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
        self._server: socket.socket | None = None
        self._peers: list[Peer] = []
        self._council: Council | None = None
        self._place = UNKNOWN
        self._stacks_at = self._pinged = self._shown = 0.0
        self._ping: tuple[float, float] | None = None
        self._links = Links(seat.host)
        self._tick = min(1.0, TICK_SECONDS * max(1.0, seat.world_size / 64))

    @property
    def heartbeat(self) -> Heartbeat:
        """The page that the rank writes; inherited by the fork."""
        return self._beat

    def run(self) -> int:
        """Until the end of the attempt; returns the code to exit with."""
        before = {n: signal.signal(n, self._note) for n in FORWARDED}
        try:
            if self.seat.rank == 0:
                self._open()
            self._link = self._join()
            return self._loop()
        finally:
            if self._child is not None:
                self._child.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
            with contextlib.suppress(OSError):
                for path in self.seat.folder.glob(f"rank-{self.seat.rank}.*.stacks"):
                    if not path.stat().st_size:
                        path.unlink()

    def _note(self, number: int, _frame: Any) -> None:
        self._asked.append(number)

    def _open(self) -> None:
        """Rank 0: listen on its own address only, and tell the others where."""
        self._server = listen(self.seat.address)
        host, port = self._server.getsockname()[:2]
        self._token = secrets.token_hex(16)
        note = {"host": host, "port": port, "token": self._token}
        write_text(self.seat.folder / "council.json", json.dumps(note))
        (self.seat.folder / "council.json").chmod(0o600)
        self._council = Council(
            self.seat.world_size, self.seat.first_seconds, now(), known_step=self.seat.known_step
        )

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
        heard = told = now()
        while True:
            self._pass_signals()
            if now() - told >= self._tick:
                self._link.send(self._status())
                told = now()
            if self._council is not None:
                self._preside(self._council)
            for message in self._link.receive():
                heard = now()
                if (code := self._obey(message)) is not None:
                    return code
            if self._link.broken or now() - heard > PEER_SECONDS:
                self._record({"class": "node", "rank": "0", "headline": "rank 0's node is lost"})
                return 1
            waiting: list[Any] = [self._link, *self._peers]
            if self._server is not None:
                waiting.append(self._server)
            select.select(waiting, [], [], TICK_SECONDS)

    def _pass_signals(self) -> None:
        while self._asked and self._child is not None:
            self._child.signal(self._asked.pop(0))

    def _status(self) -> dict[str, Any]:
        child, beat = self._child, self._beat.read()
        alive = child is not None and child.poll()
        self._deadlines.observe(beat)
        late = self._deadlines.overdue(beat, now()) if alive and self.seat.watch.hang else 0.0
        if self._stacks_at and child is not None and now() - self._stacks_at > 0.5:
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
            self._child.signal(signal.SIGUSR1)
        return None

    def _start(self, generation: int, port: int) -> None:
        self._generation = generation
        self._beat.clear()
        self._beat.enter("start")
        self._place = UNKNOWN
        sockets = [p.connection for p in (self._link, *self._peers)]
        sockets += [self._server] if self._server is not None else []

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

    def _preside(self, council: Council) -> None:
        """Rank 0: hear everybody, decide, tell everybody."""
        assert self._server is not None
        with contextlib.suppress(BlockingIOError):
            while True:
                self._peers.append(Peer(self._server.accept()[0], self._token))
        for peer in self._peers:
            for status in peer.receive():
                peer.rank = int(status["rank"])
                council.hear(peer.rank, status, now())
                if status["ping"]:
                    self._links.hear(status["host"], now() - status["ping"] - status["held"])
            if peer.broken and peer.rank is not None:
                council.lose(peer.rank)
        self._peers = [peer for peer in self._peers if not peer.broken]
        if any(m.code == 0 for m in council.members.values()):
            council.outcome_seen = self._has_outcome()
        council.may_restart = self._may_go_on()
        orders = council.tick(now())
        if not orders and now() - self._pinged >= self._tick:
            orders, self._pinged = [Order("ping")], now()
        for order in orders:
            self._tell(council, order)
        self._report_links(council)
        if now() - self._shown >= ALIVE_SECONDS:
            self._shown = now()
            with contextlib.suppress(OSError):
                (self.seat.folder / "alive").touch()

    def _report_links(self, council: Council) -> None:
        """Say which nodes turned slow to reach, and which are well again."""
        turned, well = self._links.tick(now())
        step = max((m.step for m in council.members.values()), default=0)
        for node in [*turned, *well]:
            seconds, usual = turned.get(node, (0.0, 0.0))
            ranks = [r for r, m in council.members.items() if m.host == node]
            found = Straggler(
                rank=min(ranks, default=0),
                node=node,
                ratio=seconds / usual if usual else 0.0,
                seconds=seconds,
                step=step,
                attempt=self.seat.folder.name,
                over=node in well,
                kind="network",
            )
            log.warning("%s", found.line())
            record(self.seat.folder.parents[1], found)

    def _tell(self, council: Council, order: Order) -> None:
        port = free_port(self.seat.address) if order.verb == "start" else 0
        if order.event is not None:
            event = asdict(order.event)
            event["class"] = event.pop("name")
            event["generation"], event["time"] = council.generation, time.time()
            log.warning("%s: %s", event["class"], event["headline"])
            if order.verb == "kill":
                text = json.dumps(event) + "\n"
                write_text(self.seat.folder / f"event-{council.generation}.json", text)
            else:
                self._record(event)
        message = {"verb": order.verb, "generation": order.generation, "code": order.code}
        message["at"] = now()
        for peer in self._peers:
            peer.send({**message, "port": port})

    def _record(self, event: dict[str, Any]) -> None:
        """The event that ended the attempt. The first one to be written stays."""
        if event["class"] == "node":
            (self.seat.folder / "lost_node").touch()  # for slurm/train.sbatch
        path = self.seat.folder / "last_event.json"
        if not path.exists():
            write_text(path, json.dumps(event) + "\n")

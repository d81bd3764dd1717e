"""Rank 0's watcher hears the others, lets the council decide, tells everybody, writes it down."""

import contextlib
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext.atomic import write_text
from megatron_ext.resilience.config import WatchConfig
from megatron_ext.resilience.council import Council, Order
from megatron_ext.resilience.heartbeat import now
from megatron_ext.resilience.links import Links
from megatron_ext.resilience.stragglers import Straggler, record
from megatron_ext.resilience.wire import Peer, free_port, listen

log = logging.getLogger(__name__)
STRANGER_SECONDS = 60.0  # for a connection to give the secret
MOST_STRANGERS = 64  # connections without it, beyond one for each rank
ALIVE_SECONDS = 10.0  # between signs on disk, for launch.observe


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a watcher sits."""

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


def tick_seconds(world_size: int) -> float:
    """Between reports of one watcher: those of all of them stay below five hundred a second.

    What cannot wait for the next one, a death or a rank that is late, is reported at once.
    """
    return min(1.0, 0.5 * max(1.0, world_size / 256))


def record_event(folder: Path, event: dict[str, Any]) -> None:
    """The event that ended the attempt. The first one to be written stays."""
    if event["class"] == "node":
        (folder / "lost_node").touch()  # for slurm/train.sbatch
    path = folder / "last_event.json"
    if not path.exists():
        write_text(path, json.dumps(event) + "\n")


class Chair:
    """Listens on rank 0's own address only, and tells the others where, with a secret."""

    def __init__(self, seat: Seat) -> None:
        self._seat, self._folder = seat, seat.folder
        self._server = listen(seat.address)
        host, port = self._server.getsockname()[:2]
        self._token = secrets.token_hex(16)
        path = seat.folder / "council.json"
        write_text(path, json.dumps({"host": host, "port": port, "token": self._token}))
        path.chmod(0o600)
        self._peers: list[Peer] = []
        self._council = Council(
            seat.world_size, seat.first_seconds, now(), known_step=seat.known_step
        )
        self._links = Links(seat.host)
        self._tick = tick_seconds(seat.world_size)
        self._pinged = self._shown = 0.0

    @property
    def calm(self) -> bool:
        """Nothing is waited for but reports."""
        return self._council.phase in ("run", "over")

    def sockets(self) -> list[Any]:
        """The server and every connection."""
        return [self._server, *self._peers]

    def preside(self, may_restart: bool, has_outcome: Callable[[], bool]) -> None:
        """One round."""
        self._admit()
        for peer in self._peers:
            self._hear(peer)
        self._part()
        council = self._council
        if any(m.code == 0 for m in council.members.values()):
            council.outcome_seen = has_outcome()
        council.may_restart = may_restart
        orders = council.tick(now())
        if not orders and now() - self._pinged >= self._tick:
            orders, self._pinged = [Order("ping")], now()
        for order in orders:
            self._tell(order)
        self._report_links()
        if now() - self._shown >= ALIVE_SECONDS:
            self._shown = now()
            with contextlib.suppress(OSError):
                (self._folder / "alive").touch()

    def _admit(self) -> None:
        """Let in who knocks."""
        with contextlib.suppress(OSError):  # nobody does, or has left again
            for _ in range(self._seat.world_size + MOST_STRANGERS):
                self._peers.append(Peer(self._server.accept()[0], self._token))

    def _part(self) -> None:
        """Hang up on who broke the rules, and on strangers: those silent too long or too many."""
        strangers = [peer for peer in self._peers if peer.rank is None]
        for peer in strangers:
            peer.broken |= now() - peer.since > STRANGER_SECONDS
        for peer in strangers[: -(self._seat.world_size + MOST_STRANGERS)]:
            peer.broken = True  # the oldest: a watcher says who it is at its first tick
        for peer in self._peers:
            if peer.broken:
                peer.close()
        self._peers = [peer for peer in self._peers if not peer.broken]

    def _hear(self, peer: Peer) -> None:
        for status in peer.receive():
            peer.rank = int(status["rank"])
            self._council.hear(peer.rank, status, now())
            if status["ping"]:
                self._links.hear(status["host"], now() - status["ping"] - status["held"])
        if peer.broken and peer.rank is not None:
            self._council.lose(peer.rank)

    def _tell(self, order: Order) -> None:
        port = free_port(self._seat.address) if order.verb == "start" else 0
        if order.event is not None:
            generation = self._council.generation
            event = asdict(order.event)
            event["class"] = event.pop("name")
            event["generation"], event["time"] = generation, time.time()
            log.warning("%s: %s", event["class"], event["headline"])
            if order.verb == "kill":
                text = json.dumps(event) + "\n"
                write_text(self._folder / f"event-{generation}.json", text)
            else:
                record_event(self._folder, event)
        message = {"verb": order.verb, "generation": order.generation, "code": order.code}
        for peer in self._peers:
            if peer.rank is None:
                continue  # every message holds the secret
            peer.send({**message, "port": port, "at": now()})

    def _report_links(self) -> None:
        """Say which nodes turned slow to reach, and which are well again."""
        turned, well = self._links.tick(now())
        members = self._council.members
        for node in [*turned, *well]:
            seconds, usual = turned.get(node, (0.0, 0.0))
            found = Straggler(
                rank=min((r for r, m in members.items() if m.host == node), default=0),
                node=node,
                ratio=seconds / usual if usual else 0.0,
                seconds=seconds,
                step=max((m.step for m in members.values()), default=0),
                attempt=self._folder.name,
                over=node in well,
                kind="network",
            )
            log.warning("%s", found.line())
            record(self._folder.parents[1], found)

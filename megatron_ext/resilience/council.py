"""What the ranks' watchers decide together: start, restart in place, or end. Pure, no sockets."""

import re
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.resilience.blame import culprit
from megatron_ext.resilience.suspicions import SUSPECT_EXIT, UNSOUND_EXIT

PEER_SECONDS = 8.0  # silence of a watcher that means its node is lost
ECHO_SECONDS = 1.0  # after the first death, others are let die so that the true cause is seen
EXIT_SECONDS = 30.0  # after the first clean exit, the others' time to follow
STACK_SECONDS = 1.5  # for every rank to write its stacks
DYING_SECONDS = 20.0  # after SIGKILL, before a process counts as unkillable
# What a rank says whose peer has gone.
LOST_PEER = re.compile(
    r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|[Tt]imed out|NCCL|gloo"
)


@dataclass
class Member:
    """One rank as its watcher last described it."""

    host: str
    heard: float
    generation: int = -1
    alive: bool = False
    code: int | None = None
    ended: float = 0.0
    step: int = 0
    count: int = 0
    section: str = ""
    overdue: float = 0.0
    process: str = ""
    error: str = ""
    calls: int = 0
    call: str = "?"
    frame: str = ""
    unfit: str = ""
    """Why the health check of its node failed during the run."""

    lost: bool = False


REPORTED = (
    *("generation", "alive", "code", "step", "count", "section", "overdue"),
    *("process", "error", "calls", "call", "frame", "unfit"),
)


@dataclass
class Event:
    """Something that ended a generation of ranks."""

    name: str
    rank: int
    node: str
    step: int
    headline: str


@dataclass
class Order:
    """What all watchers are told: ``start``, ``kill``, ``stacks`` or ``end``."""

    verb: str
    generation: int = 0
    code: int = 0
    event: Event | None = None


@dataclass
class Council:
    """Sits with rank 0's watcher and hears the others."""

    world_size: int
    first_seconds: float
    began: float
    may_restart: bool = True
    known_step: int = -1
    """Furthest step at which an earlier attempt failed: no second try in place up to it."""

    members: dict[int, Member] = field(default_factory=dict)
    phase: str = "gather"
    generation: int = 0
    event: Event | None = None
    since: float = 0.0
    outcome_seen: bool = False
    _then: str = "end"

    def hear(self, rank: int, status: dict[str, Any], now: float) -> None:
        """A watcher's report."""
        member = self.members.setdefault(rank, Member(host=str(status["host"]), heard=now))
        was_alive = member.alive or member.generation != status["generation"]
        for key in REPORTED:
            setattr(member, key, status[key])
        member.heard = now
        if was_alive and not member.alive and member.code is not None:
            member.ended = now

    def lose(self, rank: int) -> None:
        """A watcher's connection broke."""
        if rank in self.members:
            self.members[rank].lost = True

    def tick(self, now: float) -> list[Order]:
        """What to tell everybody now."""
        if self.phase == "over":
            return []
        if self.phase == "gather":
            return self._gather(now)
        lost = [r for r, m in self.members.items() if m.lost or now - m.heard > PEER_SECONDS]
        if lost and not self._all_done():
            # With a watcher gone, the death of its rank was only the first sign of a lost node.
            if self.event is None or self.event.rank in lost:
                host = self.members[lost[0]].host
                self.event = self._event("node", lost[0], f"no answer from {host}")
            return self._end(1, self.event)
        for rank, member in self.members.items():
            if member.unfit and not self._all_done():
                return self._end(1, self._event("node", rank, member.unfit))
        if self.phase == "run":
            return self._run(now)
        if self.phase == "echo":
            return self._after(now, ECHO_SECONDS, self._judge_deaths)
        if self.phase == "stacks":
            current = self._current().values()
            died = any(m.code not in (None, 0) for m in current)
            if died or not any(m.alive and m.overdue > 0 for m in current):
                self.phase = "run"  # late, and not hung: it went on by itself, or it died
                return []
            return self._after(now, STACK_SECONDS, self._judge_hang)
        return self._dying(now)

    def _gather(self, now: float) -> list[Order]:
        if len(self.members) == self.world_size:
            self.phase, self.since = "run", now
            return [Order("start", generation=0)]
        if now - self.began > self.first_seconds:
            missing = [r for r in range(self.world_size) if r not in self.members]
            text = f"no first heartbeat from ranks {missing[:16]} within {self.first_seconds:.0f} s"
            return self._end(1, Event("launch", missing[0], "", 0, text))
        return []

    def _current(self) -> dict[int, Member]:
        return {r: m for r, m in self.members.items() if m.generation == self.generation}

    def _all_done(self) -> bool:
        current = self._current()
        return len(current) == self.world_size and all(m.code == 0 for m in current.values())

    def _run(self, now: float) -> list[Order]:
        current = self._current()
        if self._all_done():
            return self._end(0, None)
        if any(m.code not in (None, 0) for m in current.values()):
            # A signal is never the echo of another rank's end; an exception may be.
            by_signal = any((m.code or 0) < 0 for m in current.values())
            self.phase, self.since = "echo", now - (ECHO_SECONDS if by_signal else 0.0)
            return []
        clean = [m for m in current.values() if m.code == 0]
        if clean and now - min(m.ended for m in clean) > EXIT_SECONDS:
            if self.outcome_seen:
                return self._end(0, None)  # hung at exit: the word is written, nothing is lost
            rank = next(r for r, m in current.items() if m.code == 0)
            return self._fail(self._event("short_exit", rank, "exit code 0 before the end"), now)
        if not clean and any(m.overdue > 0 for m in current.values()):
            self.phase, self.since = "stacks", now
            return [Order("stacks", generation=self.generation)]
        return []

    def _after(self, now: float, seconds: float, judge: Any) -> list[Order]:
        return self._fail(judge(), now) if now - self.since > seconds else []

    def _judge_deaths(self) -> Event:
        """Deaths by signal before exceptions, the earlier before the later: the rest are echoes.

        A rank that was suspected, and left for that, comes before all: the others wait for it.

        A lost connection is an echo whenever it was heard of, as news of ranks travel unevenly.
        """
        dead = {r: m for r, m in self._current().items() if m.code not in (None, 0)}

        def order(rank: int) -> tuple:
            m = dead[rank]
            echo = bool(LOST_PEER.search(m.error))
            return m.code != SUSPECT_EXIT, (m.code or 0) > 0, echo, m.ended, rank

        first = min(dead, key=order)
        code = dead[first].code or 0
        if code < 0:
            return self._event("process", first, f"rank {first} was ended by signal {-code}")
        name = "config" if code == 2 and dead[first].step == 0 else "crash"
        name = {SUSPECT_EXIT: "suspect", UNSOUND_EXIT: "numerics"}.get(code, name)
        return self._event(name, first, dead[first].error or f"rank {first} exit code {code}")

    def _judge_hang(self) -> Event:
        rank, text = culprit({r: m for r, m in self._current().items() if m.alive})
        return self._event("hang", rank, text)

    def _event(self, name: str, rank: int, headline: str) -> Event:
        member = self.members[rank]
        step = max(m.step for m in self.members.values())
        return Event(name, rank, member.host, step, headline)

    def _fail(self, event: Event, now: float) -> list[Order]:
        self.event = event
        furthest = max((m.step for m in self.members.values()), default=0)
        again = (
            self.may_restart
            and event.name not in ("config", "suspect")
            and furthest > self.known_step
            and not self.outcome_seen
        )
        self.known_step = max(self.known_step, furthest)
        self._then = "start" if again else "end"
        self.phase, self.since = "dying", now
        return [Order("kill", generation=self.generation, event=event if again else None)]

    def _dying(self, now: float) -> list[Order]:
        if all(not m.alive for m in self.members.values()):
            if self._then == "end":
                return self._end(1, self.event)
            self.generation += 1
            self.phase, self.since = "run", now
            for member in self.members.values():
                member.code, member.step, member.count, member.overdue = None, 0, 0, 0.0
            return [Order("start", generation=self.generation)]
        if now - self.since > DYING_SECONDS:
            return self._end(1, self.event)
        return []

    def _end(self, code: int, event: Event | None) -> list[Order]:
        self.phase, self.event = "over", event
        return [Order("end", code=code, event=event)]

"""Whoever reaches the watchers' port without the secret costs them little and learns nothing."""

import contextlib
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.resilience import chair, wire
from megatron_ext.resilience.chair import Chair, Seat
from megatron_ext.resilience.config import WatchConfig
from megatron_ext.resilience.wire import MAX_BUFFER, Peer

TOKEN = "0123456789abcdef" * 2
STATUS = {"rank": 0, "host": "n0", "generation": 0, "alive": True, "code": None, "step": 7}
STATUS |= {"count": 20, "section": "step", "overdue": 0.0, "process": "S", "error": "", "calls": 3}
STATUS |= {"call": "", "frame": "", "unfit": "", "ping": 0.0, "held": 0.0}


@pytest.fixture
def ends() -> Iterator[tuple[Peer, socket.socket]]:
    """A peer, and the raw other end of its connection."""
    server = wire.listen("127.0.0.1")
    other = socket.create_connection(server.getsockname())
    peer = Peer(server.accept()[0], TOKEN)
    yield peer, other
    peer.close()
    other.close()
    server.close()


def _flood(other: socket.socket, start: bytes) -> threading.Thread:
    """Sends a line of 64 MiB, or as much of it as it can before it is hung up on."""

    def send() -> None:
        with contextlib.suppress(OSError):
            other.sendall(start)
            for _ in range(1024):
                other.sendall(b"x" * (1 << 16))

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def _hear(peer: Peer, *, most: int) -> None:
    """Receive until the connection breaks; never may more than ``most`` bytes be kept."""
    end = time.monotonic() + 10
    while not peer.broken and time.monotonic() < end:
        assert peer.receive() == []
        assert len(peer._in) <= most
        wire.wait([peer], 0.05)
    assert peer.broken


def test_a_stranger_that_never_ends_its_line_is_hung_up_on_at_its_first_bytes(ends) -> None:
    peer, other = ends
    thread = _flood(other, b"x" * 10)
    _hear(peer, most=0)
    peer.close()
    thread.join(5)
    assert not thread.is_alive()


def test_a_line_without_end_is_given_up_even_behind_the_secret(ends) -> None:
    peer, other = ends
    thread = _flood(other, TOKEN.encode() + b' {"rank": "')
    _hear(peer, most=MAX_BUFFER)
    peer.close()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        TOKEN.encode() + b"\n",
        b"\xff" * 40 + b"\n",
        TOKEN[:-1].encode() + b'x {"rank": 0}\n',
        TOKEN.encode() + b" " + b"[" * 100_000 + b"\n",
        TOKEN.encode() + b" 7\n",
        b'{"rank": 0, "token": "\xc3\xa9"}\n',
    ],
)
def test_a_wrong_line_breaks_the_connection_and_nothing_else(ends, line: bytes) -> None:
    peer, other = ends
    other.sendall(line)
    _hear(peer, most=MAX_BUFFER)


def test_a_peer_that_reads_nothing_is_given_up_when_its_messages_pile_up(ends) -> None:
    peer, _ = ends
    most = 0
    while not peer.broken:
        peer.send({"verb": "x" * 65536})
        most = max(most, len(peer._out))
    assert MAX_BUFFER < most < MAX_BUFFER + 2 * 65536


def test_messages_arrive_whole_however_they_are_cut(ends) -> None:
    peer, other = ends
    sent = [{"verb": "ping", "n": n} for n in range(3)]
    text = b"".join(TOKEN.encode() + b" " + json.dumps(m).encode() + b"\n" for m in sent)
    heard = []
    for byte in text:
        other.sendall(bytes([byte]))
        wire.wait([peer], 1.0)
        heard += peer.receive()
    assert heard == sent
    assert not peer.broken


@pytest.fixture
def presiding(tmp_path: Path) -> Iterator[tuple[Chair, Peer, dict]]:
    """A chair of one rank, that rank's own connection, and the note that it goes by."""
    seat = Seat(
        rank=0,
        world_size=1,
        host="n0",
        address="127.0.0.1",
        folder=tmp_path,
        first_seconds=60.0,
        known_step=-1,
        watch=WatchConfig(),
    )
    presides = Chair(seat)
    note = json.loads((tmp_path / "council.json").read_text())
    link = Peer(socket.create_connection((note["host"], note["port"])), note["token"])
    assert [m["verb"] for m in _round(presides, link)] == ["start"]
    yield presides, link, note
    for one in presides.sockets():
        one.close()
    link.close()


def _round(presides: Chair, link: Peer) -> list[dict]:
    link.send(STATUS)
    presides.preside(True, lambda: False)
    wire.wait([link], 0.25)
    return link.receive()


def test_a_stranger_that_only_listens_is_told_nothing(presiding, monkeypatch) -> None:
    presides, link, note = presiding
    monkeypatch.setattr(chair, "STRANGER_SECONDS", 0.5)
    stranger = socket.create_connection((note["host"], note["port"]))
    stranger.settimeout(0.1)
    heard, verbs, end = [], [], time.monotonic() + 10
    while heard[-1:] != [b""] and time.monotonic() < end:
        verbs += [m["verb"] for m in _round(presides, link)]
        try:
            heard.append(stranger.recv(65536))
        except TimeoutError:
            continue
    assert heard == [b""]  # hung up on, without a word: every message holds the secret
    assert "ping" in verbs
    assert not link.broken
    stranger.close()


def test_a_flood_of_strangers_leaves_the_watchers_connection_alone(presiding) -> None:
    presides, link, note = presiding
    strangers = []
    for _ in range(5):
        strangers += [socket.create_connection((note["host"], note["port"])) for _ in range(60)]
        verbs = [m["verb"] for m in _round(presides, link)]
        assert len(presides.sockets()) <= 2 + 1 + chair.MOST_STRANGERS
    for stranger in strangers:
        stranger.close()
    for _ in range(3):
        verbs += [m["verb"] for m in _round(presides, link)]
    assert "ping" in verbs
    assert len(presides.sockets()) == 2
    assert not link.broken


def test_more_connections_than_select_can_count_are_waited_for() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    try:
        fill = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
        one, other = socket.socketpair()
        assert one.fileno() > 1023
        other.sendall(b"x")
        begun = time.monotonic()
        wire.wait([one], 30.0)
        assert time.monotonic() - begun < 10
        for handle in [one.detach(), other.detach(), *fill]:
            os.close(handle)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

"""Lines over TCP between watchers: the attempt's secret, a space, a message in JSON.

Whoever does not begin with the secret is hung up on before anything is kept, parsed or answered.
"""

import contextlib
import hmac
import json
import select
import socket
from collections.abc import Iterable
from typing import Any

from megatron_ext.resilience.heartbeat import now

MAX_BUFFER = 1 << 20
"""Bytes that one connection may leave unread or unfinished; a message has a few hundred."""


class Peer:
    """One non-blocking connection."""

    def __init__(self, connection: socket.socket, token: str) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self._token = connection, f"{token} ".encode()
        self._in, self._out = b"", b""
        self.since = now()
        self.rank: int | None = None
        self.broken = False

    def fileno(self) -> int:
        """For select."""
        return self.connection.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message and send what the socket takes."""
        self._out += self._token + json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what is queued."""
        try:
            while self._out:
                self._out = self._out[self.connection.send(self._out) :]
        except BlockingIOError:
            self.broken = self.broken or len(self._out) > MAX_BUFFER
        except OSError:
            self.broken = True

    def receive(self) -> list[dict[str, Any]]:
        """Whole messages that have arrived.

        A line without the secret, or longer than ``MAX_BUFFER``, breaks the connection.
        """
        try:
            while chunk := self.connection.recv(65536):
                self._in += chunk
                if len(self._in) > MAX_BUFFER or not self._knows(self._in):
                    self.broken, self._in = True, b""
                    return []
            self.broken = True
        except BlockingIOError:
            pass
        except OSError:
            self.broken = True
        *lines, self._in = self._in.split(b"\n")
        found = [self._parse(line) for line in lines]
        return [message for message in found if message is not None]

    def _knows(self, line: bytes) -> bool:
        """The line begins with the secret, as far as it has arrived."""
        told = line[: len(self._token)]
        return hmac.compare_digest(told, self._token[: len(told)])

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        with contextlib.suppress(ValueError, RecursionError):
            if len(line) > len(self._token) and self._knows(line):
                message = json.loads(line[len(self._token) :])
                if isinstance(message, dict):
                    return message
        self.broken = True
        return None

    def close(self) -> None:
        """Hang up."""
        self.connection.close()


def wait(sockets: "Iterable[Peer | socket.socket]", seconds: float) -> None:
    """Until one of them has something to read. Unlike select's, their numbers may pass 1023."""
    poll = select.poll()
    for one in sockets:
        poll.register(one, select.POLLIN)
    poll.poll(1000 * seconds)


def listen(address: str) -> socket.socket:
    """A listening socket on a free port of ``address`` only, never of all interfaces."""
    family, kind, proto, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    server = socket.socket(family, kind, proto)
    server.bind((where[0], 0))
    server.listen(4096)
    server.setblocking(False)
    return server


def free_port(address: str) -> int:
    """A port of ``address`` that nobody listens on now."""
    server = listen(address)
    port = server.getsockname()[1]
    server.close()
    return port

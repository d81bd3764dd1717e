"""JSON lines over TCP between watchers, each message with the attempt's secret."""

import hmac
import json
import socket
from typing import Any

MAX_BUFFER = 1 << 20


class Peer:
    """One non-blocking connection."""

    def __init__(self, connection: socket.socket, token: str) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self._token = connection, token
        self._in, self._out = b"", b""
        self.rank: int | None = None
        self.broken = False

    def fileno(self) -> int:
        """For select."""
        return self.connection.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message and send what the socket takes."""
        self._out += json.dumps({**message, "token": self._token}).encode() + b"\n"
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
        """Whole messages that have arrived. A message without the secret breaks the connection."""
        try:
            while chunk := self.connection.recv(65536):
                self._in += chunk
                if len(self._in) > MAX_BUFFER:
                    self.broken = True
                    return []
            self.broken = True
        except BlockingIOError:
            pass
        except OSError:
            self.broken = True
        *lines, self._in = self._in.split(b"\n")
        found = [self._parse(line) for line in lines]
        return [message for message in found if message is not None]

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        try:
            message = json.loads(line)
            if hmac.compare_digest(str(message.pop("token", "")), self._token):
                return message
        except (ValueError, AttributeError):
            pass
        self.broken = True
        return None

    def close(self) -> None:
        """Hang up."""
        self.connection.close()


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

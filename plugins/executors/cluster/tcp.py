"""Connections between the executor and its ranks: TCP, opened with a key, closed by a peer that vanishes."""

from __future__ import annotations

import hmac
import secrets
import socket
from contextlib import closing

from interlace.plugins.executors.cluster.messages import Seat

KEY_LENGTH = 32
SILENCE_MS = 10_000
"""A machine that confirms nothing for so long is lost (lost power, cut cable); a process that ends is noticed at once."""
_PROBE_S = 2


class Listener:
    """Waits for the one connection that knows the key."""

    def __init__(self, host: str) -> None:
        """Listen on a free port of this machine's address `host`."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        self.key = secrets.token_bytes(KEY_LENGTH)

    def accept(self, timeout_s: float) -> socket.socket:
        """Raises `TimeoutError` if the executor does not come. Whoever else comes is sent away."""
        self._socket.settimeout(timeout_s)
        with closing(self._socket):
            while True:
                connection, _ = self._socket.accept()
                if self._knows_key(connection):
                    prepare(connection)
                    return connection
                connection.close()

    def _knows_key(self, connection: socket.socket) -> bool:
        connection.settimeout(5.0)
        said = b""
        try:
            while len(said) < KEY_LENGTH and (more := connection.recv(KEY_LENGTH - len(said))):
                said += more
        except OSError:
            return False
        return hmac.compare_digest(said, self.key)


def connect(seat: Seat, timeout_s: float) -> socket.socket:
    """The executor's end of the connection to a rank. Raises `OSError`."""
    connection = socket.create_connection((seat.host, seat.port), timeout_s)
    connection.sendall(seat.key)
    prepare(connection)
    return connection


def prepare(connection: socket.socket) -> None:
    """Send small messages at once, block without a limit, and notice a machine that is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_MS)


def answers(host: str, port: int, timeout_s: float = 2.0) -> bool:
    """Whether anybody listens there."""
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError:
        return False
    return True

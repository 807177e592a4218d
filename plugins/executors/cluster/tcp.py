"""Connections between the executor and its ranks: TCP, opened with a key, closed when a machine vanishes."""

from __future__ import annotations

import hmac
import secrets
import socket

from interlace.plugins.executors.cluster.messages import Seat

KEY_LENGTH = 32
SILENCE_MS = 10_000
"""A machine that confirms nothing for so long is lost (power, cable); a process that ends is noticed at once."""
_PROBE_S = 2
_KEY_TIMEOUT_S = 5.0


class Listener:
    """Waits for those who know the key."""

    def __init__(self, host: str) -> None:
        """Listen on a free port of this machine's address `host`."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        self.key = secrets.token_bytes(KEY_LENGTH)

    def accept(self, timeout_s: float | None) -> socket.socket:
        """The next connection that gives the key; others are sent away. Raises `TimeoutError`, and `OSError` after
        `close`."""
        self._socket.settimeout(timeout_s)
        while True:
            connection, _ = self._socket.accept()
            if self._knows_key(connection):
                prepare(connection)
                return connection
            connection.close()

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()

    def _knows_key(self, connection: socket.socket) -> bool:
        connection.settimeout(_KEY_TIMEOUT_S)
        said = b""
        try:
            while len(said) < KEY_LENGTH and (more := connection.recv(KEY_LENGTH - len(said))):
                said += more
        except OSError:
            return False
        return hmac.compare_digest(said, self.key)


def connect(seat: Seat, timeout_s: float) -> socket.socket:
    """A connection to a rank. Raises `OSError`."""
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


def read_all(seat: Seat, timeout_s: float) -> str:
    """What a rank says to a connection that it then closes; empty if it says nothing in time."""
    said = b""
    try:
        with connect(seat, timeout_s) as connection:
            connection.settimeout(timeout_s)
            while more := connection.recv(1 << 16):
                said += more
    except OSError:
        pass
    return said.decode("utf-8", "replace")


def answers(host: str, port: int, timeout_s: float = 2.0) -> bool:
    """Whether anybody listens there."""
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError:
        return False
    return True

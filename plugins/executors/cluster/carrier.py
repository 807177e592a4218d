"""What carries messages between a front and an engine on another machine: one TCP connection."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections import deque

from interlace.clock import Clock
from interlace.interfaces.host import EngineConnection
from interlace.plugins.executors.processes.channel import MessageReader, frame

FAREWELL_S = 10.0
"""How long the other end is given to hear the last word."""
_ROUNDS = 5
_TIME = struct.Struct("<d")


class Outbox:
    """Sends messages in order and makes nobody wait: what the kernel does not take at once, a thread sends."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._pending: deque[bytes] = deque()
        self._broken = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, message: bytes) -> None:
        """Send a message. Raises `ConnectionError` if the connection is known to be broken."""
        data = frame(message)
        with self._changed:
            if not self._pending and not self._broken:
                data = data[self._send_some(data) :]
            if self._broken:
                raise ConnectionError("the connection is broken")
            if data:
                self._pending.append(data)
                self._changed.notify_all()
                if self._thread is None:
                    self._thread = threading.Thread(target=self._send_rest, name="interlace-outbox", daemon=True)
                    self._thread.start()

    def flush(self, timeout_s: float) -> None:
        """Wait until everything is sent, or cannot be."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending or self._broken, timeout_s)

    def close(self) -> None:
        """Send nothing more. The connection must have been shut down, so that nobody is held up in it."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _send_some(self, data: bytes) -> int:
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            self._broken = True
            return 0

    def _send_rest(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._broken)
                if self._broken:
                    return
                data = self._pending[0]  # stays there while it is sent, so that nothing overtakes it
            try:
                self._socket.sendall(data)
            except OSError:
                with self._changed:
                    self._broken = True
                    self._changed.notify_all()
                return
            with self._changed:
                self._pending.popleft()
                self._changed.notify_all()


class TcpConnection(EngineConnection):
    """The engine's end."""

    def __init__(self, connection: socket.socket, clock_offset: float) -> None:
        self.clock_offset = clock_offset
        self._socket = connection
        self._reader = MessageReader(connection)
        self._read: deque[bytes] = deque()
        self._outbox = Outbox(connection)

    def receive(self) -> bytes:
        while not self._read:
            try:
                self._read.extend(self._reader.read())
            except OSError:
                raise EOFError from None
        return self._read.popleft()

    def send(self, message: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self._outbox.put(message)

    def close(self) -> None:
        """Closing a connection with something unread would take back what was said last, so the front is to close it
        first."""
        self._outbox.flush(FAREWELL_S)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        poller = select.poll()
        poller.register(self._socket, select.POLLRDHUP)
        poller.poll(1000 * FAREWELL_S)


def ask_time(connection: socket.socket, clock: Clock) -> float:
    """How far the clock at the other end, where `tell_time` runs, is ahead of this one. Of several answers the quickest
    counts, which is wrong by less than half of the time it took. Raises `OSError` or `EOFError`."""
    quickest, offset = float("inf"), 0.0
    for _ in range(_ROUNDS):
        asked = clock.now()
        connection.sendall(b"?")
        there = _TIME.unpack(_read(connection, _TIME.size))[0]
        took = clock.now() - asked
        if took < quickest:
            quickest, offset = took, there - (asked + took / 2)
    return offset


def tell_time(connection: socket.socket, clock: Clock) -> None:
    """Answer `ask_time`. Raises `OSError` or `EOFError`."""
    for _ in range(_ROUNDS):
        _read(connection, 1)
        connection.sendall(_TIME.pack(clock.now()))


def _read(connection: socket.socket, length: int) -> bytes:
    read = b""
    while len(read) < length:
        if not (more := connection.recv(length - len(read))):
            raise EOFError
        read += more
    return read

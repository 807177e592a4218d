"""`Channel`: what a rank says to its executor, over a socket: messages with their length before them."""

from __future__ import annotations

import socket
import threading

_LENGTH = 8
_PIECE = 1 << 16


def frame(message: bytes) -> bytes:
    """A message as it travels: with its length before it."""
    return len(message).to_bytes(_LENGTH, "little") + message


class Channel:
    """The rank's end. `send` may come from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._lock = threading.Lock()

    def send(self, message: bytes) -> None:
        """Say something; blocks while the executor does not listen."""
        with self._lock:
            self._socket.sendall(frame(message))

    def receive(self) -> bytes:
        """The one message that the executor sends this way. Raises `EOFError` when it is gone."""
        reader = MessageReader(self._socket)
        while not (messages := reader.read()):
            pass
        return messages[0]


class MessageReader:
    """Cuts what comes over a socket into messages."""

    def __init__(self, source: socket.socket) -> None:
        self._source = source
        self._pending = bytearray()

    def read(self) -> list[bytes]:
        """Read once, which blocks if there is nothing; returns the messages that are complete now.

        Raises `EOFError` at the end of the stream."""
        received = self._source.recv(_PIECE)
        if not received:
            raise EOFError
        self._pending += received
        messages = []
        while len(self._pending) >= _LENGTH:
            end = _LENGTH + int.from_bytes(self._pending[:_LENGTH], "little")
            if len(self._pending) < end:
                break
            messages.append(bytes(self._pending[_LENGTH:end]))
            del self._pending[:end]
        return messages

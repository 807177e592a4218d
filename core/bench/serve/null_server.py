"""A server that does no work: it answers OpenAI requests with tokens at a fixed pace and says when it sent each.

The self-test of `bench serve` runs it in a process of its own (`python -m interlace.bench.serve.null_server`), to learn
what the client itself adds. It prints its port, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import sys

import msgspec

from interlace.clock import Clock, MonotonicClock

MODELS = b'{"object":"list","data":[{"id":"null","object":"model"}]}'


class _Body(msgspec.Struct):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    interval_s: float = 0.0
    """Pace of the answer; a field of ours."""


class NullConnection(asyncio.Protocol):
    """One HTTP/1.1 connection, as much of it as a well-behaved client needs."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        first, *fields = head.split(b"\r\n")
        values = dict(field.lower().split(b": ", 1) for field in fields if b": " in field)
        length = int(values.get(b"content-length", b"0"))
        if len(rest) < length:
            return
        body, self._received = rest[:length], rest[length:]
        if first.startswith(b"GET"):
            self._write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(MODELS)
            )
            self._write(MODELS)
            return
        asked = msgspec.json.decode(body, type=_Body)
        tokens = asked.max_completion_tokens or asked.max_tokens or 16
        self._write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        self._answer(tokens, tokens, asked.interval_s)

    def _answer(self, left: int, total: int, interval_s: float) -> None:
        """Send the next token, and see to the others."""
        while left:
            reason = b'"length"' if left == 1 else b"null"
            chunk = b'{"choices":[{"index":0,"text":" a","finish_reason":%s}],"sent":%r}' % (reason, self._clock.now())
            self._event(chunk)
            left -= 1
            if interval_s and left:
                asyncio.get_running_loop().call_later(interval_s, self._answer, left, total, interval_s)
                return
        self._event(b'{"choices":[],"usage":{"prompt_tokens":0,"completion_tokens":%d}}' % total)
        self._event(b"[DONE]")
        self._write(b"0\r\n\r\n")

    def _event(self, data: bytes) -> None:
        self._write(b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data))

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    clock = MonotonicClock()
    server = await loop.create_server(lambda: NullConnection(clock), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(_serve())

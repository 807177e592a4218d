"""Answers that end with their client: server-sent events, and waiting that stops when nobody waits any more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from interlace.clock import Clock
from interlace.errors import InterlaceError
from interlace.server.errors import ApiError, describe

logger = logging.getLogger("interlace.server")
T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment: clients skip it."""


def event(data: bytes) -> bytes:
    """One event of a line of data."""
    return b"data: " + data + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves; then raises `ClientDisconnect`."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        await _cancel(task, gone)


class EventStream(Response):
    """Sends events as they come.

    The head of the answer waits for the first event, so that what fails before it is an answer with a status of its
    own, and no stream. What fails later is the stream's last event. When the client leaves, `events` is closed at
    once, wherever it is."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], keep_alive_s: float, clock: Clock) -> None:
        """`keep_alive_s`: after so long a silence a comment is sent; 0: never."""
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._keep_alive = keep_alive_s or None
        self._clock = clock
        self._last = clock.now()
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            while not work.done() and not gone.done():
                wait = None if self._keep_alive is None else self._last + self._keep_alive - self._clock.now()
                if wait is not None and wait <= 0:
                    await self._write(send, KEEP_ALIVE)
                else:
                    await asyncio.wait({work, gone}, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            await _cancel(work, gone)

    async def _pump(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            try:
                async for data in events:
                    await self._write(send, data)
            except Exception as error:
                if not self._started:
                    raise
                if not isinstance(error, InterlaceError | ApiError):
                    logger.exception("a stream failed")
                await self._write(send, event(msgspec.json.encode(describe(error).content)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, data: bytes) -> None:
        self._last = self._clock.now()
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": data, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

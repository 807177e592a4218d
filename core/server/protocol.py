"""HTTP/1.1 connections with limits on what a client may hold open: uvicorn's protocol has none on headers and time."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEADER_SIZE = 64 * 1024
"""Bytes of request line and headers beyond the first read; more is answered 431."""


class HttpConfig(uvicorn.Config):
    """uvicorn's configuration with what `LimitedProtocol` needs."""

    def __init__(self, *args: Any, client_timeout: float, **kwargs: Any) -> None:
        """`client_timeout`: seconds a client has to send a whole request; 0: no limit."""
        super().__init__(*args, **(kwargs | {"http": LimitedProtocol}))
        self.client_timeout = client_timeout


class LimitedProtocol(HttpToolsProtocol):
    """Closes connections whose client sends a request too slowly, or headers without end. Others do not notice."""

    config: HttpConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._begun = self._in_headers = False
        self._header_size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        continued = self._in_headers
        super().data_received(data)
        if continued and self._in_headers:
            self._header_size += len(data)
            if self._header_size > MAX_HEADER_SIZE:
                self._refuse(431, "The request's headers are too large.")

    def on_message_begin(self) -> None:
        self._begun = self._in_headers = True
        self._header_size = 0
        self._arm()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._disarm()
        self._begun = False
        super().on_message_complete()

    def _arm(self) -> None:
        self._disarm()
        if self.config.client_timeout:
            self._timer = self.loop.call_later(self.config.client_timeout, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if self.flow.read_paused:
            self._arm()  # it is we who do not read: an answer to an earlier request is under way
        elif self._begun:
            self._refuse(408, "The request took too long to arrive.")
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Say why, if no answer has begun, and hang up."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            head = STATUS_LINE[status] + b"content-type: text/plain\r\nconnection: close\r\n"
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(message) + message.encode())
        self.transport.close()

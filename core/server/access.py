"""The outermost middleware: every request has an id, and leaves one line in the log."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from interlace.clock import Clock

logger = logging.getLogger("interlace.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
PROBES = ("/health", "/ready", "/load", "/metrics")
"""Asked every few seconds by machines: their successes are logged at level debug."""
MAX_LOGGED = 64 * 1024
"""Bytes of a prompt or an answer that are logged at most."""


class AccessLog:
    """ASGI middleware: `scope["state"]["request_id"]` is the client's `X-Request-Id` if it is fit to be one, else a new
    one; answers carry it in the same header. Streams pass through untouched."""

    def __init__(self, app: ASGIApp, clock: Clock, *, lines: bool, contents: bool) -> None:
        """`lines`: log a line per request; `contents`: log bodies of requests and answers, too."""
        self._app = app
        self._clock = clock
        self._lines = lines
        self._contents = contents

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._contents)
        began = self._clock.now()
        try:
            await self._app(scope, exchange.receive if self._contents else receive, exchange.send)
        finally:
            if self._lines:
                self._log(scope, exchange, self._clock.now() - began)
            if self._contents:
                exchange.log_contents()

    def _log(self, scope: Scope, exchange: _Exchange, seconds: float) -> None:
        quiet = scope["path"] in PROBES and exchange.status == 200
        level = logging.DEBUG if quiet else logging.INFO
        if not logger.isEnabledFor(level):
            return
        client = scope.get("client") or ("unix", None)
        fields = {
            "request_id": exchange.request_id,
            "client": str(client[0]) or "unix",
            "method": scope["method"],
            # Without the query: addresses are no place for secrets, but people put them there.
            "path": scope["path"],
            "status": exchange.status,
            "seconds": round(seconds, 4),
            "complete": exchange.complete,
        }
        end = "" if exchange.complete else ", cut off"
        logger.log(
            level,
            "%(client)s %(method)s %(path)r %(status)d in %(seconds).3f s%(end)s (%(request_id)s)",
            fields | {"end": end},
            extra={"fields": fields},
        )


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, contents: bool) -> None:
        self.request_id = _request_id(scope["headers"])
        self.status = 499  # as nginx has it: the client left before an answer began
        self.complete = False
        self._header = (b"x-request-id", self.request_id.encode())
        self._receive = receive
        self._send = send
        self._contents = contents
        self._asked, self._answered = bytearray(), bytearray()
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), self._header]
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
            if self._contents:
                self._answered += message.get("body", b"")[: MAX_LOGGED - len(self._answered)]
        await self._send(message)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._asked += message.get("body", b"")[: MAX_LOGGED - len(self._asked)]
        return message

    def log_contents(self) -> None:
        for what, data in (("request", self._asked), ("answer", self._answered)):
            if data:
                text = data.decode("utf-8", "replace")
                logger.info(
                    "%s of %s: %s", what, self.request_id, text, extra={"fields": {"request_id": self.request_id}}
                )


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if REQUEST_ID.fullmatch(text):
                return text
    return uuid.uuid4().hex

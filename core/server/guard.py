"""What a request must pass before a route sees it: key, drain, load, size. Anything not named open needs a key."""

from __future__ import annotations

import asyncio
import contextlib
import math

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from interlace.config.settings import ServerSettings, parse_memory
from interlace.server.auth import ApiKeys
from interlace.server.errors import error_response

OPEN_PATHS = ("/health", "/ready")
PAGE_PATH = "/"
PAGE_FILES = "/page/"
"""The page's static files: they hold no data, and the page itself asks for the key."""
OPEN_WHILE_DRAINING = ("/health", "/load", "/metrics")
LATE = 5.0
"""Seconds after `server.request_timeout_s` for the engine's own word, before the connection is ended without it."""


class Guard:
    """ASGI middleware. Streams pass through untouched; a body is read here, whole, so that routes never wait for a
    client. Sets `key_salt` in `scope["state"]`: a cache salt of the request's key, or None; and `trusted`: whether
    the request may see what only holders of a key may."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, keys: ApiKeys, max_running: int) -> None:
        """`max_running`: how many requests the engine runs at a time, beside `settings.max_waiting` that wait."""
        self._app = app
        self._keys = keys
        self._settings = settings
        self._max_body = body_limit(settings)
        self._capacity = settings.max_waiting + max_running if settings.max_waiting else math.inf
        self._working = 0
        self._draining = False
        self._drained = asyncio.Event()

    @property
    def working(self) -> int:
        """Requests under way that a drain waits for."""
        return self._working

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    async def drain(self) -> None:
        """Refuse new requests from now on; returns once those under way have ended."""
        self._draining = True
        if self._working:
            await self._drained.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = _route_path(scope)
        refusal = self._refusal(scope, path)
        if refusal is not None:
            await refusal(scope, receive, send)
        elif path in OPEN_WHILE_DRAINING:
            await self._app(scope, receive, send)
        else:
            self._working += 1
            try:
                await self._pass(scope, receive, send)
            finally:
                self._working -= 1
                if self._draining and not self._working:
                    self._drained.set()

    def _refusal(self, scope: Scope, path: str) -> ASGIApp | None:
        """The answer to a request that may not pass."""
        salt = self._keys.check(scope["headers"]) if self._keys else None
        state = scope.setdefault("state", {})
        state["key_salt"] = salt if self._settings.isolate_keys else None
        state["trusted"] = salt is not None or not self._keys
        if self._keys and salt is None and not self._is_open(scope["method"], path):
            return _unauthorized(scope)
        if self._draining and path not in OPEN_WHILE_DRAINING:
            return _unavailable("the server is shutting down", "shutting_down", self._settings.drain_timeout_s)
        # Bodies and parsed prompts take memory before the engine's own count of waiting requests sees them.
        if scope["method"] == "POST" and self._working >= self._capacity:
            return _unavailable(f"{self._working} requests are under way already; try again later", "overloaded", 1.0)
        return None

    def _is_open(self, method: str, path: str) -> bool:
        if method not in ("GET", "HEAD"):
            return False
        is_page = self._settings.page and (path == PAGE_PATH or path.startswith(PAGE_FILES))
        return path in OPEN_PATHS or is_page

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        length, chunked = _framing(scope["headers"])
        if length > self._max_body:
            await self._too_large(scope, receive, send)
            return
        if not length and not chunked:
            await self._run(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body:
                await self._too_large(scope, receive, send)
                return
        await self._run(scope, _replay(bytes(body), receive), send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._settings.request_timeout_s
        if not limit:
            await self._app(scope, receive, send)
            return
        started = False

        async def tell(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(limit + LATE) as timeout:
                await self._app(scope, receive, tell)
        except TimeoutError:
            if not timeout.expired():
                raise
            if not started:
                text = f"the request took longer than {limit:g} s (server.request_timeout_s)"
                await error_response(504, text, "timeout_error", "timeout")(scope, receive, send)

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = f"the body has more than {self._max_body} bytes (server.max_body_size)"
        await error_response(413, text, "invalid_request_error", "body_too_large")(scope, receive, send)


def body_limit(settings: ServerSettings) -> int:
    """`server.max_body_size` in bytes."""
    size = parse_memory(settings.max_body_size)
    assert isinstance(size, int), "validated by the settings"
    return size


def _route_path(scope: Scope) -> str:
    """The path as routes see it: without the prefix of a reverse proxy."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    return path[len(prefix) :] if prefix and path.startswith(prefix + "/") else path


def _framing(headers: list[tuple[bytes, bytes]]) -> tuple[int, bool]:
    """(declared length of the body, whether one of unknown length follows)"""
    length, chunked = 0, False
    for name, value in headers:
        if name == b"content-length":
            with contextlib.suppress(ValueError):  # the HTTP parser has refused those before
                length = int(value)
        elif name == b"transfer-encoding":
            chunked = True
    return length, chunked


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for a body that was read already: it first, then what else the client does."""
    told = False

    async def replayed() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _unauthorized(scope: Scope) -> ASGIApp:
    presented = any(name == b"authorization" for name, _ in scope["headers"])
    text = (
        "the API key is not known here"
        if presented
        else "an API key is missing: send it in the header 'Authorization: Bearer KEY'"
    )
    code = "invalid_api_key" if presented else "missing_api_key"
    response = error_response(401, text, "authentication_error", code)
    response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _unavailable(text: str, code: str, retry_after: float) -> ASGIApp:
    response = error_response(503, text, "overloaded_error", code)
    response.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    return response

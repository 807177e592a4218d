"""The application as uvicorn serves it: middlewares around it, connections with limits, no signals of its own."""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
from collections.abc import Generator

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from interlace.clock import Clock
from interlace.config.settings import ServerSettings
from interlace.server.access import AccessLog
from interlace.server.auth import ApiKeys
from interlace.server.guard import Guard
from interlace.server.protocol import HttpConfig

KEEP_ALIVE = 75
"""Seconds an idle connection is kept: longer than the 60 s after which load balancers usually give theirs up, so that
it is they who close, and no request meets a closing connection."""
GRACE = 2.0
"""Seconds for connections to finish once the server was stopped."""


def wrap(
    app: ASGIApp, settings: ServerSettings, keys: ApiKeys, max_running: int, clock: Clock
) -> tuple[Guard, ASGIApp]:
    """`app` behind its middlewares: log and request id outermost, then CORS, whose preflights carry no key, then the
    guard, which is returned, too."""
    guard = Guard(app, settings, keys, max_running)
    inner: ASGIApp = guard
    if settings.cors_origins:
        inner = CORSMiddleware(
            guard,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return guard, AccessLog(inner, clock, lines=settings.access_log, contents=settings.log_prompts)


class HttpServer(uvicorn.Server):
    """uvicorn's server without its signal handlers and its ten looks a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """End `serve`: nothing new is accepted, connections get a moment to finish."""
        self.should_exit = True
        self._stopped.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are the caller's."""
        yield

    async def main_loop(self) -> None:
        """Once a second, for the `Date` header."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), 1.0)


def make_server(app: ASGIApp, settings: ServerSettings, tls: ssl.SSLContext | None) -> HttpServer:
    """A server for `app`; the socket is given to `serve`."""
    config = HttpConfig(
        app,
        client_timeout=settings.client_timeout_s,
        root_path=settings.root_path,
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(GRACE),
        ssl_context_factory=(lambda _config, _default: tls) if tls is not None else None,
    )
    return HttpServer(config)

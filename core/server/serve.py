"""`serve`: one engine behind HTTP, from the checks before the start to the drain at the end.

Everything that can be wrong with addresses, keys and certificates is found before the model is loaded, which takes the
time. While the engine process loads it, this process imports the HTTP side.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
from typing import TYPE_CHECKING, Any, NamedTuple

from interlace.clock import MonotonicClock, local_time
from interlace.config import LoadedSettings
from interlace.engine.async_llm import AsyncLLM
from interlace.errors import ConfigError, InterlaceError
from interlace.server import tracing
from interlace.server.auth import ApiKeys, read_keys
from interlace.server.listen import Listener, bind, tls_context
from interlace.server.logs import ServerLog
from interlace.server.report import report

if TYPE_CHECKING:
    import ssl

    from interlace.server.guard import Guard
    from interlace.server.http import HttpServer

logger = logging.getLogger("interlace.server")

OK, FAILED, MISCONFIGURED = 0, 1, 2
"""Exit codes: stopped when asked to; the engine died for good; could not start. After a second signal: 128 + signal."""
LAST_WORDS = 2.0
"""Seconds for answers to leave after their engine was stopped."""
START_GRACE = 5.0
"""Seconds a start under way may still take when the process is told to stop."""
MAX_FILES = 65_536


def serve(loaded: LoadedSettings) -> int:
    """Serve until told to stop; returns the exit code. Raises `InterlaceError` when it cannot start."""
    log = ServerLog(loaded)
    try:
        prepared = prepare(loaded)
        try:
            return asyncio.run(_run(prepared, log))
        finally:
            prepared.listener.close()
    except InterlaceError as error:
        if loaded.settings.server.log_format != "json":
            raise
        logger.critical("%s", error)  # for whoever reads the log by machine
        return MISCONFIGURED
    finally:
        log.close()


async def _run(prepared: Prepared, log: ServerLog) -> int:
    return await _Service(prepared, log).run()


class Prepared(NamedTuple):
    """What is known to be right before the model is loaded."""

    loaded: LoadedSettings
    keys: ApiKeys
    tls: ssl.SSLContext | None
    listener: Listener
    model_names: tuple[str, ...]


def prepare(loaded: LoadedSettings) -> Prepared:
    """Check names, keys and certificates, and take the address. Raises `ConfigError` naming the setting at fault."""
    names = model_names(loaded)
    tracing.check(loaded.settings.server.otlp_endpoint)
    keys = read_keys(loaded)
    context = tls_context(loaded)
    return Prepared(loaded, keys, context, bind(loaded, have_keys=bool(keys)), names)


def model_names(loaded: LoadedSettings) -> tuple[str, ...]:
    """Names clients may use for the model: `server.served_model_names`, or what the model is called."""
    given = loaded.settings.server.served_model_names
    for name in given:
        if not name or name != name.strip():
            source = loaded.source("server.served_model_names")
            raise ConfigError(f"server.served_model_names ({source}) has {name!r}: a name has no blanks around it")
    model = loaded.settings.model
    own = os.path.basename(model.rstrip("/")) if os.path.exists(model) else model
    return tuple(dict.fromkeys(given)) or (own,)


class _Service:
    """One run of the server."""

    def __init__(self, prepared: Prepared, log: ServerLog) -> None:
        self._prepared = prepared
        self._settings = prepared.loaded.settings.server
        self._log = log
        self._clock = MonotonicClock()
        self._signals: list[int] = []
        self._told_to_stop = asyncio.Event()
        self._told_again = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        _raise_file_limit()
        began = self._clock.now()
        llm = AsyncLLM.from_loaded(self._prepared.loaded, default_process="subprocess", supervised=True)
        if not await self._start(llm):
            return 128 + self._signals[0]
        guard, http = self._open(llm)
        self._prepared.listener.listen()
        serving = asyncio.ensure_future(http.serve(sockets=[self._prepared.listener.socket]))
        for line in report(self._prepared, self._clock.now() - began):
            logger.info("%s", line)
        try:
            return await self._wait(llm, guard, serving)
        finally:
            await self._close(llm, http, serving)

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        (self._told_again if self._told_to_stop.is_set() else self._told_to_stop).set()

    async def _start(self, llm: AsyncLLM) -> bool:
        """Start the engine, and import the HTTP side meanwhile. False: told to stop instead."""
        starting = asyncio.ensure_future(llm.start())
        await asyncio.sleep(0)  # the engine first: it takes longer
        await asyncio.to_thread(_import_http)
        stop = asyncio.ensure_future(self._told_to_stop.wait())
        first: set[asyncio.Future[Any]] = {starting, stop}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not stop.done():
            stop.cancel()
            await starting
            return True
        logger.info("told to stop while starting")
        await asyncio.wait({starting}, timeout=START_GRACE)
        if not starting.done():
            self._exit_now()
        await llm.shutdown()
        return False

    def _open(self, llm: AsyncLLM) -> tuple[Guard, HttpServer]:
        """The application over a started engine, and the server that will run it."""
        from interlace.server.app import create_app
        from interlace.server.http import make_server, wrap
        from interlace.server.metrics.http import CountRequests
        from interlace.server.state import ServerState

        prepared, settings = self._prepared, self._settings
        llm.front.limit_waiting(settings.max_waiting)
        state = ServerState(llm, settings, prepared.model_names, created=int(local_time().timestamp()))
        app = create_app(state)
        guard, application = wrap(app, settings, prepared.keys, llm.front.num_seats, self._clock)
        if settings.metrics:
            application = CountRequests(application, app.state.http_totals)
        return guard, make_server(application, settings, prepared.tls)

    async def _wait(self, llm: AsyncLLM, guard: Guard, serving: asyncio.Future[None]) -> int:
        """Serve until there is a reason to end, and let requests under way end, too. Returns the exit code."""
        stop = asyncio.ensure_future(self._told_to_stop.wait())
        death = asyncio.wrap_future(llm.front.death)
        reasons: set[asyncio.Future[Any]] = {stop, death, serving}
        await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if serving.done():
            await serving  # raises what went wrong
            return FAILED
        if death.done():
            logger.critical("the engine is dead and is not started again; the server ends: %s", death.result())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(guard.drain(), LAST_WORDS)
            return FAILED
        return await self._drain(guard, death)

    async def _drain(self, guard: Guard, death: asyncio.Future[Any]) -> int:
        limit = self._settings.drain_timeout_s
        name = signal.Signals(self._signals[0]).name
        logger.info(
            "%s: new requests are refused; %d under way may take up to %g s, another signal ends them",
            name,
            guard.working,
            limit,
        )
        drained = asyncio.ensure_future(guard.drain())
        again = asyncio.ensure_future(self._told_again.wait())
        ends: set[asyncio.Future[Any]] = {drained, again, death}
        await asyncio.wait(ends, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        drained.cancel()
        if guard.working:
            logger.warning("%d requests are cut off", guard.working)
        return 128 + self._signals[-1] if self._told_again.is_set() else OK

    async def _close(self, llm: AsyncLLM, http: HttpServer, serving: asyncio.Future[None]) -> None:
        """The engine first: what still streams then ends with an error that says so, not in the middle of a word."""
        closing = asyncio.ensure_future(llm.shutdown())
        again = asyncio.ensure_future(self._told_again.wait())
        await asyncio.sleep(0)
        http.stop()
        await asyncio.wait({serving}, timeout=2 * LAST_WORDS)
        either: set[asyncio.Future[Any]] = {closing, again}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not closing.done():
            await asyncio.wait({closing}, timeout=0.5)
        if not closing.done():
            self._exit_now()
        again.cancel()
        logger.info("stopped")

    def _exit_now(self) -> None:
        """End this process without waiting for its threads. The engine process ends with it."""
        self._prepared.listener.close()
        self._log.close()
        os._exit(128 + self._signals[-1] if self._signals else FAILED)


def _import_http() -> None:
    import interlace.server.app
    import interlace.server.http  # noqa: F401


def _raise_file_limit() -> None:
    """Every connection takes a file descriptor, and the usual soft limit of 1024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

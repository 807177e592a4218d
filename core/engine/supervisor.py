"""`Supervisor`: an engine client whose engine is started again when it dies.

One engine at a time, in a child process. Its death fails the requests it had, at once; those that come while the new
one is being started are refused with `EngineRestartingError`. An engine that dies too often stays dead.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from interlace.clock import Clock
from interlace.engine.client import EngineClient, EngineHealth, OnDeath, OnEvent, OnOutput
from interlace.engine.output_processor import dead_again
from interlace.errors import EngineDeadError, EngineRestartingError, EngineSilentError
from interlace.interfaces.executor import ExecutorInfo
from interlace.messages import EngineRequest

logger = logging.getLogger("interlace.engine")

MAX_DELAY = 10.0
"""Seconds between a death and the next start, at most."""


class Supervisor(EngineClient):
    """Makes a new client, and with it a new engine, for each that dies; thread-safe as any client.

    A client hands on everything its engine said before it tells of the engine's death, from the same thread; only then
    is the next one made. So no request ever receives output of an engine other than the one that took it.
    """

    def __init__(self, make: Callable[[], EngineClient], clock: Clock, max_restarts: int, window_s: float) -> None:
        """`make` gives a client that is not started. More than `max_restarts` deaths within `window_s` seconds, starts
        that failed included, are the end."""
        self._make = make
        self._clock = clock
        self._max_restarts = max_restarts
        self._window = window_s
        self._lock = threading.Lock()
        self._client: EngineClient | None = None
        self._refusal: EngineDeadError | None = EngineDeadError("the engine was not started")  # None: the engine runs
        self._deaths: deque[float] = deque()  # within the window
        self._restarts = 0
        self._last_cause: str | None = None
        self._start_seconds = 0.0
        self._alive = False  # whether the client's engine has not died since it was told to start
        self._closing = threading.Event()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # ── the client ────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, on_output: OnOutput, on_death: OnDeath, on_event: OnEvent | None = None) -> ExecutorInfo:
        self._on_output, self._on_death, self._on_event = on_output, on_death, on_event
        info = self._launch()
        self._thread = threading.Thread(target=self._supervise, name="interlace-supervisor", daemon=True)
        self._thread.start()
        self._open()
        return info

    def add(self, requests: list[EngineRequest]) -> None:
        with self._foreseeing():
            self._engine().add(requests)

    def abort(self, request_ids: list[str]) -> None:
        self._engine().abort(request_ids)

    def control(self, operation: str, **arguments: Any) -> Any:
        with self._foreseeing():
            return self._engine().control(operation, **arguments)

    def health(self, timeout: float = 5.0) -> EngineHealth:
        """As every client's, but never raises: `restarting` and `dead` are statuses."""
        try:
            found = self._engine().health(timeout)
        except EngineSilentError as error:
            found = EngineHealth(status="degraded", reason=str(error))
        except EngineDeadError as error:
            verdict = self._foresee(error)
            restarting = isinstance(verdict, EngineRestartingError)
            found = EngineHealth(status="restarting" if restarting else "dead", reason=str(verdict))
        return msgspec.structs.replace(found, restarts=self._restarts, last_cause=self._last_cause)

    def shutdown(self) -> None:
        with self._lock:
            self._closing.set()
            self._refusal = EngineDeadError("the engine was shut down")
            client = self._client
        self._wake.put(None)
        if client is not None:
            client.shutdown()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @contextlib.contextmanager
    def _foreseeing(self) -> Iterator[None]:
        try:
            yield
        except EngineRestartingError:
            raise
        except EngineDeadError as error:
            raise self._foresee(error) from error.__cause__

    def _foresee(self, error: EngineDeadError) -> EngineDeadError:
        """What will be said of a death: the engine may have died this very moment, and the thread that decides what
        follows is yet to do so."""
        with self._lock:
            if self._refusal is not None:
                return dead_again(self._refusal)
            return EngineRestartingError(str(error)) if len(self._deaths) < self._max_restarts else error

    def _engine(self) -> EngineClient:
        """The client of the running engine. Raises why there is none."""
        with self._lock:
            if self._refusal is not None:
                raise dead_again(self._refusal)
            assert self._client is not None
            return self._client

    # ── death and restart ─────────────────────────────────────────────────────────────────────────────────────

    def _launch(self) -> ExecutorInfo:
        """Start an engine; raises the true cause when that fails. `_open` lets requests in."""
        client = self._make()
        with self._lock:
            if self._closing.is_set():
                raise EngineDeadError("the engine was shut down")
            self._client = client  # so that `shutdown` reaches it
            self._alive = True
        began = self._clock.now()
        try:
            info = client.start(self._on_output, self._engine_died, self._on_event)
        except BaseException:
            client.shutdown()
            raise
        self._start_seconds = self._clock.now() - began
        return info

    def _open(self) -> None:
        """From now on the engine takes requests, unless it has died since it was ready."""
        with self._lock:
            if self._alive and not self._closing.is_set():
                self._refusal = None

    def _engine_died(self, error: EngineDeadError) -> None:
        """From the client's thread: decide, tell everyone, and leave the rest to the supervising thread."""
        with self._lock:
            if self._closing.is_set():
                return
            self._alive = False
            told = self._refusal = self._judge(str(error), error.__cause__)
        self._on_death(told)
        self._wake.put(None)

    def _judge(self, story: str, cause: BaseException | None) -> EngineDeadError:
        """Count a death, or a start that failed; what to tell those who wait and those who come."""
        now = self._clock.now()
        self._last_cause = story
        while self._deaths and self._deaths[0] <= now - self._window:
            self._deaths.popleft()
        self._deaths.append(now)
        told: EngineDeadError
        if len(self._deaths) > self._max_restarts:
            told = EngineDeadError(
                f"{story}; it is not started again: this was failure {len(self._deaths)} within {self._window:g} s "
                f"(engine.max_restarts = {self._max_restarts})"
            )
        else:
            retry_after = max(1.0, self._start_seconds + self._delay())
            told = EngineRestartingError(f"{story}; a new engine is being started", retry_after)
        told.__cause__ = cause
        return told

    def _delay(self) -> float:
        """Seconds to wait before the next start: none after a first death, then longer each time."""
        return min(MAX_DELAY, 0.5 * (2.0 ** (len(self._deaths) - 1) - 1.0))

    def _supervise(self) -> None:
        """A thread: sleeps until an engine dies, then starts the next; ends when there is nothing left to try."""
        while True:
            self._wake.get()
            while isinstance(self._refusal, EngineRestartingError):
                self._clear_away()
                if not self._closing.wait(self._delay()):
                    self._restart()
            if self._refusal is not None:
                self._clear_away()
                return

    def _restart(self) -> None:
        try:
            info = self._launch()
        except BaseException as error:
            self._start_failed(error)
            return
        with self._lock:
            self._restarts += 1
        logger.warning("the engine was started again in %.2f s", self._start_seconds)
        if self.on_restart is not None:
            self.on_restart(info)
        self._open()

    def _start_failed(self, error: BaseException) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            told = self._judge(f"the engine could not be started again: {type(error).__name__}: {error}", error)
            self._refusal = told
        if isinstance(told, EngineRestartingError):
            logger.error("%s", told, exc_info=error)
        else:
            self._on_death(told)

    def _clear_away(self) -> None:
        """Free what the dead engine's client holds: its sockets, its directory, its thread."""
        if self._client is not None:
            self._client.shutdown()

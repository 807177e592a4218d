"""What both transports share: an engine client is commands that go out and answers that come back."""

from __future__ import annotations

import itertools
import threading
from abc import abstractmethod
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import msgspec

from interlace.engine.client import EngineClient, EngineHealth
from interlace.engine.loop import Abort, Add, Command, Control
from interlace.errors import EngineDeadError, EngineSilentError
from interlace.messages import EngineRequest


class PendingCalls:
    """Answers that threads wait for, by call id. Thread-safe."""

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._futures: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()

    def open(self) -> tuple[int, Future[Any]]:
        future: Future[Any] = Future()
        with self._lock:
            call_id = next(self._ids)
            self._futures[call_id] = future
        return call_id, future

    def resolve(self, call_id: int, value: Any, error: BaseException | None) -> None:
        with self._lock:
            future = self._futures.pop(call_id, None)
        if future is None:
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    def fail_all(self, error: BaseException) -> None:
        with self._lock:
            futures, self._futures = list(self._futures.values()), {}
        for future in futures:
            future.set_exception(error)


class CommandClient(EngineClient):
    """A client that reaches its engine loop through `_send`. A dead engine answers every call with its own death."""

    def __init__(self) -> None:
        self._calls = PendingCalls()
        self._dead: EngineDeadError | None = None

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Hand a command to the loop of an engine that is not known to be dead."""

    def _post(self, command: Command) -> None:
        if self._dead is not None:
            raise EngineDeadError(str(self._dead)) from self._dead.__cause__
        self._send(command)

    def _died(self, error: EngineDeadError, cause: BaseException | None = None) -> EngineDeadError:
        """From now on every call fails with `error`; those under way fail at once."""
        error.__cause__ = cause
        self._dead = error
        self._calls.fail_all(error)
        return error

    def add(self, requests: list[EngineRequest]) -> None:
        self._post(Add(requests))

    def abort(self, request_ids: list[str]) -> None:
        self._post(Abort(request_ids))

    def health(self, timeout: float = 5.0) -> EngineHealth:
        return msgspec.convert(self._call("health", {}, timeout), EngineHealth)

    def control(self, operation: str, **arguments: Any) -> Any:
        return self._call(operation, arguments, None)

    def _call(self, operation: str, arguments: dict[str, Any], timeout: float | None) -> Any:
        call_id, future = self._calls.open()
        try:
            self._post(Control(call_id, operation, arguments))
        except EngineDeadError:
            self._calls.resolve(call_id, None, None)  # nobody will
            raise
        if self._dead is not None:  # it may have died between the check and the post
            self._calls.fail_all(self._dead)
        try:
            return future.result(timeout)
        except FutureTimeoutError:
            raise EngineSilentError(f"the engine loop did not answer within {timeout} s") from None

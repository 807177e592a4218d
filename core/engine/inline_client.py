"""`InlineClient`: the engine as a thread of this process. Right for offline use and few cores."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from interlace.clock import Clock
from interlace.engine.client import EngineClient, EngineHealth, OnDeath, OnEvent, OnOutput
from interlace.engine.core import EngineCore
from interlace.engine.loop import Abort, Add, Command, Control, EngineLoop, Stop
from interlace.errors import EngineDeadError
from interlace.interfaces.executor import Executor, ExecutorEvent, ExecutorInfo
from interlace.messages import EngineRequest

BuildCore = Callable[[ExecutorInfo], EngineCore]
StartExecutor = Callable[[OnEvent], tuple[Executor, ExecutorInfo]]


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


class InlineClient(EngineClient):
    """Starts executor and loop in one thread of its own and talks to it through the loop's inbox."""

    def __init__(self, start_executor: StartExecutor, build_core: BuildCore, clock: Clock) -> None:
        self._start_executor = start_executor
        self._build_core = build_core
        self._clock = clock
        self._loop: EngineLoop | None = None
        self._thread: threading.Thread | None = None
        self._calls = PendingCalls()
        self._dead: EngineDeadError | None = None
        self._stopping = False

    def start(self, on_output: OnOutput, on_death: OnDeath, on_event: OnEvent | None = None) -> ExecutorInfo:
        ready: Future[ExecutorInfo] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(ready, on_output, on_death, on_event), name="interlace-engine", daemon=True
        )
        self._thread.start()
        return ready.result()

    def _run(
        self, ready: Future[ExecutorInfo], on_output: OnOutput, on_death: OnDeath, on_event: OnEvent | None
    ) -> None:
        executor: Executor | None = None
        try:
            executor, info = self._start_executor(on_event or _ignore)
            self._loop = EngineLoop(self._build_core(info), executor, self._clock, on_output, self._calls.resolve)
            if self._stopping:  # `shutdown` came before there was a loop to tell
                self._loop.post(Stop())
            ready.set_result(info)
            self._loop.run()
            self._dead = EngineDeadError("the engine was shut down")
            self._calls.fail_all(self._dead)
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
                return
            self._dead = EngineDeadError(f"the engine stopped: {type(error).__name__}: {error}")
            self._dead.__cause__ = error
            self._calls.fail_all(self._dead)
            on_death(self._dead)
        finally:
            if executor is not None:
                executor.shutdown()

    def _post(self, command: Command) -> None:
        if self._dead is not None:
            raise EngineDeadError(str(self._dead)) from self._dead.__cause__
        if self._loop is None:
            raise EngineDeadError("the engine was not started")
        self._loop.post(command)

    def add(self, requests: list[EngineRequest]) -> None:
        self._post(Add(requests))

    def abort(self, request_ids: list[str]) -> None:
        self._post(Abort(request_ids))

    def health(self, timeout: float = 5.0) -> EngineHealth:
        health: EngineHealth = self._call("health", {}, timeout)
        return health

    def control(self, operation: str, **arguments: Any) -> Any:
        return self._call(operation, arguments, None)

    def _call(self, operation: str, arguments: dict[str, Any], timeout: float | None) -> Any:
        call_id, future = self._calls.open()
        self._post(Control(call_id, operation, arguments))
        if self._dead is not None:  # it may have died between the check and the post
            self._calls.fail_all(self._dead)
        try:
            return future.result(timeout)
        except FutureTimeoutError:
            raise EngineDeadError(f"the engine loop did not answer within {timeout} s") from None

    def shutdown(self) -> None:
        thread = self._thread
        if thread is None:
            return
        self._stopping = True
        if self._loop is not None and self._dead is None:
            self._loop.post(Stop())
        if thread is not threading.current_thread():
            thread.join()


def _ignore(event: ExecutorEvent) -> None:
    pass

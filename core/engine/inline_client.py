"""`InlineClient`: the engine as a thread of this process. Right for offline use and few cores."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from interlace.clock import Clock
from interlace.engine.client import OnDeath, OnEvent, OnOutput
from interlace.engine.command_client import CommandClient
from interlace.engine.core import EngineCore
from interlace.engine.loop import Command, EngineLoop, Stop
from interlace.engine.step_watchdog import OnHang, StepWatchdog
from interlace.errors import EngineDeadError
from interlace.interfaces.executor import Executor, ExecutorEvent, ExecutorInfo

logger = logging.getLogger("interlace.engine")

BuildCore = Callable[[ExecutorInfo], EngineCore]
StartExecutor = Callable[[OnEvent], tuple[Executor, ExecutorInfo]]


class InlineClient(CommandClient):
    """Starts executor and loop in one thread of its own and talks to it through the loop's inbox."""

    def __init__(
        self,
        start_executor: StartExecutor,
        build_core: BuildCore,
        clock: Clock,
        step_timeout: float = 120.0,
    ) -> None:
        """A step that takes longer than `step_timeout` seconds is a death; its thread cannot be ended and is left
        behind."""
        super().__init__()
        self._step_timeout = step_timeout
        self._start_executor = start_executor
        self._build_core = build_core
        self._clock = clock
        self._loop: EngineLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._stuck = False

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
            executor, info = self._start_executor(self._hears(on_event or _ignore))
            self._loop = EngineLoop(self._build_core(info), executor, self._clock, on_output, self._calls.resolve)
            executor.check_health()  # what happened since it started, the loop has not heard
            if self._stopping:  # `shutdown` came before there was a loop to tell
                self._loop.post(Stop())
            ready.set_result(info)
            with StepWatchdog(self._loop, self._clock, self._step_timeout, self._hung(on_death)):
                self._loop.run()
            self._died(EngineDeadError("the engine was shut down"))
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
                return
            if self._stuck:  # and told so long ago
                return
            on_death(self._died(EngineDeadError(f"the engine stopped: {type(error).__name__}: {error}"), error))
        finally:
            if executor is not None:
                executor.shutdown()

    def _hears(self, on_event: OnEvent) -> OnEvent:
        """Events go to the front, and to the loop once there is one."""

        def hear(event: ExecutorEvent) -> None:
            on_event(event)
            if self._loop is not None:
                self._loop.hear(event)

        return hear

    def _hung(self, on_death: OnDeath) -> OnHang:
        """What the watchdog does: give the thread up."""

        def hung(error: TimeoutError, report: str) -> None:
            assert self._loop is not None
            logger.error("%s\n%s", error, report)
            self._stuck = True
            self._loop.abandon(error)
            on_death(self._died(EngineDeadError(f"the engine stopped: {error}"), error))

        return hung

    def _send(self, command: Command) -> None:
        if self._loop is None:
            raise EngineDeadError("the engine was not started")
        self._loop.post(command)

    def shutdown(self) -> None:
        thread = self._thread
        if thread is None:
            return
        self._stopping = True
        if self._loop is not None and self._dead is None:
            self._loop.post(Stop())
        if thread is not threading.current_thread() and not self._stuck:
            thread.join()


def _ignore(event: ExecutorEvent) -> None:
    pass

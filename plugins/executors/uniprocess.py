"""`uniprocess`: one worker in the engine's own thread. The least overhead, and all that one device needs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from interlace.clock import MonotonicClock
from interlace.interfaces.executor import Executor, ExecutorEvent, ExecutorInfo

if TYPE_CHECKING:
    from interlace.messages import StepPlan, StepResult
    from interlace.spec import ResolvedSpec
    from interlace.worker.worker import Worker


class UniprocessExecutor(Executor):
    """Runs each step inside `submit`, so the future it returns is already done."""

    _worker: Worker | None = None

    def start(self, spec: ResolvedSpec, on_event: Callable[[ExecutorEvent], None]) -> ExecutorInfo:
        clock = MonotonicClock()
        began = clock.now()
        from interlace.worker.worker import Worker

        self._worker = Worker(spec, on_event, clock)
        return self._worker.start(began)

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        try:
            if self._worker is None:
                raise RuntimeError("the executor was not started, or was shut down")
            future.set_result(self._worker.execute(plan))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

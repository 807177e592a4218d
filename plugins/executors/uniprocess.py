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
    from interlace.worker.streams import Stream
    from interlace.worker.worker import Worker


class UniprocessExecutor(Executor):
    """On a CPU a step runs inside `submit`, so the future it returns is already done. On a GPU `submit` hands the step
    to the device, and the future waits for it when it is asked."""

    _worker: Worker | None = None

    def start(self, spec: ResolvedSpec, on_event: Callable[[ExecutorEvent], None]) -> ExecutorInfo:
        clock = MonotonicClock()
        began = clock.now()
        from interlace.worker.worker import Worker

        self._worker = Worker(spec, on_event, clock, stream=self.make_stream())
        return self._worker.start(began)

    def make_stream(self) -> Stream | None:
        """The device to run ahead of; None: that of the GPU, if the engine runs on one. Tests override this."""
        return None

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        if self._worker is not None:
            return self._worker.submit(plan)
        future: Future[StepResult] = Future()
        future.set_exception(RuntimeError("the executor was not started, or was shut down"))
        return future

    def check_health(self) -> None:
        if self._worker is not None:
            self._worker.check_health()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

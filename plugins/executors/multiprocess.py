"""`multiprocess`: one process per rank on this machine, with tensor and pipeline parallelism."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any

from interlace.clock import MonotonicClock
from interlace.errors import ConfigError
from interlace.interfaces.executor import Executor, ExecutorEvent, ExecutorInfo
from interlace.plugins.executors.ranks.options import RankOptions

if TYPE_CHECKING:
    from interlace.messages import StepPlan, StepResult
    from interlace.plugins.executors.processes.processes import RankProcesses
    from interlace.plugins.executors.ranks.ledger import StepLedger
    from interlace.plugins.executors.ranks.wire import Happened, Logged, ToRank
    from interlace.spec import ResolvedSpec


class MultiprocessExecutor(Executor):
    """Hands every plan to all ranks through shared memory, and takes the result from the rank that samples.

    With several ranks a step that fails is the end of them all: the others may be in the middle of an exchange with the
    one that failed. `check_health` then raises, and a supervised engine is started again."""

    class Options(RankOptions):
        """Options of the multiprocess executor."""

    _processes: RankProcesses | None = None
    _ledger: StepLedger | None = None

    def start(self, spec: ResolvedSpec, on_event: Callable[[ExecutorEvent], None]) -> ExecutorInfo:
        if sys.platform != "linux":
            raise ConfigError("executor.use = 'multiprocess' needs Linux; 'uniprocess' runs everywhere")
        from interlace.plugins.executors.processes.processes import RankProcesses
        from interlace.plugins.executors.ranks import wire
        from interlace.plugins.executors.ranks.ledger import StepLedger, merge

        places = self.options.places(spec)
        self._ledger = ledger = StepLedger(len(places))
        self._processes = RankProcesses(
            spec, places, ledger, _forward(on_event), _tell_of_death(on_event), MonotonicClock()
        )
        self._processes.start()
        prepared = self._ask(wire.Prepare(), self.options.start_timeout_s)
        num_blocks = min(answer.num_blocks for answer in prepared)
        started = self._ask(wire.Start(num_blocks), self.options.start_timeout_s)
        ledger.started = True
        return merge([answer.info for answer in started])

    @property
    def pids(self) -> list[int]:
        """Process ids in the order of ranks, for supervision and tests."""
        return [] if self._processes is None else self._processes.pids

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        try:
            if self._ledger is None or self._processes is None:
                raise RuntimeError("the executor was not started, or was shut down")
            future, message = self._ledger.submit(plan)
        except Exception as error:
            future.set_exception(error)
            return future
        self._processes.send(message)
        return future

    def control(self, operation: str, **arguments: Any) -> Any:
        """Run an operation on all ranks; the list of what they return. `ranks`: what each is and has done."""
        from interlace.plugins.executors.ranks import wire

        answers = self._ask(wire.Control(operation, arguments), None)
        for answer in answers:
            if answer.error is not None:
                raise answer.error.rebuild()
        return [answer.value for answer in answers]

    def check_health(self) -> None:
        if self._ledger is None:
            raise RuntimeError("the executor was not started, or was shut down")
        if self._ledger.failure is not None:
            raise self._ledger.failure

    def shutdown(self) -> None:
        processes, self._processes = self._processes, None
        if processes is not None and self._ledger is not None:
            self._ledger.fail(RuntimeError("the executor was shut down"))
            processes.stop()

    def _ask(self, message: ToRank, timeout: float | None) -> list[Any]:
        """Ask all ranks, and wait. After `timeout` seconds the ranks are ended, and the error says where they were."""
        if self._ledger is None or self._processes is None:
            raise RuntimeError("the executor was not started, or was shut down")
        answers, encoded = self._ledger.ask(message)
        self._processes.send(encoded)
        try:
            return answers.result(timeout)
        except FutureTimeoutError:
            if answers.done():
                raise
            self._processes.give_up(f"the ranks were not ready after {timeout:g} s (executor option start_timeout_s)")
            return answers.result()


def _forward(on_event: Callable[[ExecutorEvent], None]) -> Callable[[Happened | Logged], None]:
    """What ranks say by the way: events to the engine, log lines to the log."""
    from interlace.plugins.executors.ranks import wire

    def forward(said: Happened | Logged) -> None:
        if isinstance(said, wire.Happened):
            on_event(said.event)
        else:
            logging.getLogger(said.logger).log(said.level, "%s", said.text)

    return forward


def _tell_of_death(on_event: Callable[[ExecutorEvent], None]) -> Callable[[BaseException], None]:
    return lambda error: on_event(ExecutorEvent("worker_died", str(error)))

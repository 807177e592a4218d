"""`Driver`: an engine core over a real executor, as the engine's loop drives it, with a bound on every wait."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

import msgspec

from interlace.clock import MonotonicClock
from interlace.engine.core import EngineCore
from interlace.interfaces.executor import Executor, ExecutorEvent, ExecutorInfo
from interlace.interfaces.scheduler import Scheduler, StepBuilder
from interlace.messages import EngineRequest, SamplingParams, StepOutput, StepPlan, StepResult
from interlace.scheduling.fallback import complete
from interlace.spec import ResolvedSpec
from interlace.testing.time_limit import time_limit

NO_SUCH_SLOT = 10**6


class UnhealthyError(Exception):
    """The executor says that it cannot go on."""


class _ArrivalOrder(Scheduler):
    """The core's own fallback."""

    def __init__(self) -> None:
        super().__init__(self.Options())

    def plan(self, step: StepBuilder) -> None:
        complete(step)  # type: ignore[arg-type]


class WorkerExecutor(Executor):
    """One worker, run inside `submit`: what other executors are measured by."""

    def __init__(self) -> None:
        super().__init__(self.Options())
        self._worker: Any = None

    def start(self, spec: ResolvedSpec, on_event: Callable[[ExecutorEvent], None]) -> ExecutorInfo:
        from interlace.worker.worker import Worker

        self._worker = Worker(spec, on_event)
        info: ExecutorInfo = self._worker.start()
        return info

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        future.set_result(self._worker.execute(plan))
        return future

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()


class Driver:
    """Starts `executor`, and then runs requests on it."""

    def __init__(self, executor: Executor, spec: ResolvedSpec, timeout_s: float) -> None:
        self.executor = executor
        self.events: list[ExecutorEvent] = []
        self.steps: list[tuple[StepPlan, StepResult]] = []
        """Steps that succeeded."""
        self.settled: list[int] = []
        """Ids of steps in the order in which their futures were done."""
        self.failures: list[BaseException] = []
        self.tokens: dict[str, list[int]] = {}
        self.errors: dict[str, str | None] = {}
        """Request → why it ended, None unless with an error."""
        self.most_in_flight = 0
        self.spoil: int | None = None
        """The step whose plan is to name a slot that does not exist."""
        self._timeout_s = timeout_s
        self._vocab_size = spec.model_config.vocab_size
        self._clock = MonotonicClock()
        self._in_flight: deque[tuple[StepPlan, Future[StepResult]]] = deque()
        with time_limit(timeout_s, "start"):
            self.info = executor.start(spec, self.events.append)
        self.core = EngineCore(
            _ArrivalOrder(), "arrival order", spec.limits, self.info, max_model_len=spec.max_model_len
        )

    def add(self, prompt: list[int], *, seed: int = 0, **params: Any) -> str:
        """A request; returns its id."""
        name = f"r{len(self.tokens)}"
        self.tokens[name] = []
        request = EngineRequest(
            id=name,
            prompt_token_ids=prompt,
            params=SamplingParams(**params),
            arrival_time=self._clock.now(),
            seed=seed,
        )
        self.core.add(request, self._clock.now())
        return name

    def run(self) -> None:
        """Run until all requests have ended."""
        while self.step():
            pass

    def step(self) -> bool:
        """Submit as many steps as may be under way, then take the oldest. False: there is nothing left to do."""
        self.submit_all()
        if self._in_flight:
            self._take()
        elif self.core.has_work:
            raise AssertionError("the requests that are left cannot run")
        output = self.core.pending_output(self._clock.now())
        if output is not None:
            self._absorb(output)
        return self.core.has_work

    def submit_all(self) -> list[Future[StepResult]]:
        """Plan and submit as many steps as may be under way; returns the new futures."""
        futures = []
        while len(self._in_flight) < self.info.max_in_flight:
            plan = self.core.plan(self._clock.now())
            if plan is None:
                break
            if plan.step_id == self.spoil:
                plan = msgspec.structs.replace(plan, slots=[NO_SUCH_SLOT] * len(plan.slots))
            futures.append(self.submit(plan))
            self._in_flight.append((plan, futures[-1]))
            self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
        return futures

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Submit a plan. `AssertionError` if the executor answers otherwise than with a future."""
        with time_limit(self._timeout_s, f"submit of step {plan.step_id}"):
            try:
                future = self.executor.submit(plan)
            except Exception as error:
                raise AssertionError(
                    f"failure: submit raised {error!r}; the future is to carry what goes wrong"
                ) from error
        assert isinstance(future, Future), f"submit returned {future!r}, not a concurrent.futures.Future"
        future.add_done_callback(lambda _: self.settled.append(plan.step_id))
        return future

    def wait(self, future: Future[StepResult]) -> None:
        """Wait until a future is done, whatever comes of it."""
        try:
            future.exception(self._timeout_s)
        except TimeoutError:
            raise AssertionError(f"no hanging: a step is neither done nor failed after {self._timeout_s:g} s") from None
        except CancelledError:
            return

    def result(self, future: Future[StepResult]) -> StepResult:
        """The result of a step; raises what it failed with."""
        self.wait(future)
        return future.result()

    def check_health(self) -> None:
        """Raises `UnhealthyError` if the executor says that it cannot go on."""
        with time_limit(self._timeout_s, "check_health"):
            try:
                self.executor.check_health()
            except Exception as error:
                raise UnhealthyError(str(error)) from error

    def _take(self) -> None:
        plan, future = self._in_flight.popleft()
        self.wait(future)
        try:
            result = future.result()
        except (Exception, CancelledError) as error:
            self._take_failure(plan, error)
            return
        _check_columns(plan, result, self._vocab_size)
        self.steps.append((plan, result))
        self._absorb(self.core.update(result, self._clock.now()))

    def _take_failure(self, plan: StepPlan, error: BaseException) -> None:
        assert plan.step_id == self.spoil, f"step {plan.step_id} failed: {error!r}"
        assert str(error), f"failure: the exception of step {plan.step_id} says nothing: {error!r}"
        self.failures.append(error)
        self.spoil = None
        for _, future in self._in_flight:
            # It fails, too, if it was there when the step failed; from outside nobody can tell. The core drops it.
            self.wait(future)
        self._in_flight.clear()
        self._absorb(self.core.fail(str(error), self._clock.now()))

    def _absorb(self, output: StepOutput) -> None:
        start = 0
        for name, count in zip(output.request_ids, output.counts, strict=True):
            self.tokens[name] += output.token_ids[start : start + count]
            start += count
        for name, info in output.finished.items():
            self.errors[name] = info.error


def _check_columns(plan: StepPlan, result: StepResult, vocab_size: int) -> None:
    what = f"result of step {plan.step_id}"
    assert result.step_id == plan.step_id, f"order: the {what} says that it is of step {result.step_id}"
    assert len(result.counts) == len(plan.slots), f"{what}: {len(result.counts)} counts for {len(plan.slots)} rows"
    assert sum(result.counts) == len(result.token_ids), f"{what}: the counts do not add up to the tokens"
    assert all(0 <= token < vocab_size for token in result.token_ids), f"{what}: no such token: {result.token_ids}"
    assert 0 <= result.duration < math.inf, f"{what}: a duration of {result.duration} s"

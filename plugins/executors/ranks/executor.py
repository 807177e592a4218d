"""`RanksExecutor`: what `multiprocess` and `ray` have in common: everything but where the ranks are."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any, Protocol

from interlace.interfaces.executor import WORKER_DIED, Executor, ExecutorEvent, ExecutorInfo

if TYPE_CHECKING:
    from interlace.messages import StepPlan, StepResult
    from interlace.plugins.executors.ranks.ledger import StepLedger
    from interlace.plugins.executors.ranks.wire import Happened, Logged, ToRank
    from interlace.spec import ResolvedSpec
    from interlace.worker.place import Place

OnSaid = Callable[["Happened | Logged"], None]
OnDeath = Callable[[BaseException], None]


class Ranks(Protocol):
    """The ranks of one executor, wherever they are. What they answer goes into a ledger, and so does their end."""

    def start(self) -> None:
        """Start all; they then wait for messages. Raises the true cause if that fails."""
        ...

    def send(self, message: bytes) -> None:
        """Hand a message to all. If they are gone nobody hears it; the ledger knows why, or will."""
        ...

    def give_up(self, why: str) -> None:
        """End all with an error that says `why` and what they were doing; the ledger hears of it."""
        ...

    def stop(self) -> None:
        """End all, gently if they listen, and free everything. Called once, and also after a failed `start`."""
        ...


class RanksExecutor(Executor):
    """Hands every plan to all ranks, and takes the result from the rank that samples. Its options are `RankOptions`.

    With several ranks a step that fails is the end of them all: the others may be in the middle of an exchange with the
    one that failed. `check_health` then raises, and a supervised engine is started again."""

    _ranks: Ranks | None = None
    _ledger: StepLedger | None = None

    @abstractmethod
    def make_ranks(self, spec: ResolvedSpec, ledger: StepLedger, on_said: OnSaid, on_death: OnDeath) -> Ranks:
        """The ranks, not started. `on_death` is to be called when ranks that were ready cannot go on."""

    def places(self, spec: ResolvedSpec) -> Sequence[Place]:
        places: Sequence[Place] = self.options.places(spec)
        return places

    def start(self, spec: ResolvedSpec, on_event: Callable[[ExecutorEvent], None]) -> ExecutorInfo:
        from interlace.plugins.executors.ranks import wire
        from interlace.plugins.executors.ranks.ledger import StepLedger, merge

        self._ledger = ledger = StepLedger(self.options.world)
        self._ranks = self.make_ranks(spec, ledger, _forward(on_event), _tell_of_death(on_event))
        self._ranks.start()
        prepared = self._ask(wire.Prepare(), self.options.start_timeout_s)
        num_blocks = min(answer.num_blocks for answer in prepared)
        started = self._ask(wire.Start(num_blocks), self.options.start_timeout_s)
        ledger.started = True
        return merge([answer.info for answer in started])

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        try:
            if self._ledger is None or self._ranks is None:
                raise RuntimeError("the executor was not started, or was shut down")
            future, message = self._ledger.submit(plan)
        except Exception as error:
            future.set_exception(error)
            return future
        self._ranks.send(message)
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
        ranks, self._ranks = self._ranks, None
        if ranks is not None and self._ledger is not None:
            self._ledger.fail(RuntimeError("the executor was shut down"))
            ranks.stop()

    def _ask(self, message: ToRank, timeout: float | None) -> list[Any]:
        """Ask all ranks, and wait. After `timeout` seconds the ranks are ended, and the error says where they were."""
        if self._ledger is None or self._ranks is None:
            raise RuntimeError("the executor was not started, or was shut down")
        answers, encoded = self._ledger.ask(message)
        self._ranks.send(encoded)
        try:
            return answers.result(timeout)
        except FutureTimeoutError:
            if answers.done():
                raise
            self._ranks.give_up(f"the ranks were not ready after {timeout:g} s (executor option start_timeout_s)")
            return answers.result()


def _forward(on_event: Callable[[ExecutorEvent], None]) -> OnSaid:
    """What ranks say by the way: events to the engine, log lines to the log."""
    from interlace.plugins.executors.ranks import wire

    def forward(said: Happened | Logged) -> None:
        if isinstance(said, wire.Happened):
            on_event(said.event)
        else:
            logging.getLogger(said.logger).log(said.level, "%s", said.text)

    return forward


def _tell_of_death(on_event: Callable[[ExecutorEvent], None]) -> OnDeath:
    return lambda error: on_event(ExecutorEvent(WORKER_DIED, str(error)))

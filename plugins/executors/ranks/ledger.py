"""`StepLedger`: the executor's side, without a transport: which steps and questions are under way, and who answered."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import msgspec

from interlace.interfaces.executor import ExecutorInfo
from interlace.messages import StepPlan, StepResult
from interlace.plugins.executors.ranks import wire
from interlace.plugins.executors.ranks.blame import Sort, Trouble
from interlace.worker.feedback import Feedback

Answer = wire.Prepared | wire.Started | wire.Controlled


class _Submitted(NamedTuple):
    plan: StepPlan
    future: Future[StepResult]


class StepLedger:
    """Pairs what was said to the ranks with their answers. Thread-safe.

    `submit` and `ask` come from the executor's thread and give what is to be sent to every rank, in this order;
    `answer` and `fail` come from whichever thread hears the ranks."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.started = False
        """Whether steps may come; set by the executor."""
        self.progress = 0
        """Grows with every step and question that has ended."""
        self._lock = threading.Lock()
        self._steps: deque[_Submitted] = deque()
        self._feedback = Feedback()
        self._answers: dict[int, Answer] = {}
        self._question: Future[list[Answer]] | None = None
        self._failure: BaseException | None = None

    @property
    def failure(self) -> BaseException | None:
        """Why nothing can run any more, or None."""
        return self._failure

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._steps) or self._question is not None

    def submit(self, plan: StepPlan) -> tuple[Future[StepResult], bytes]:
        """A step is to be run: its future, and the message for all ranks. Raises the failure if there was one."""
        future: Future[StepResult] = Future()
        with self._lock:
            self._check()
            self._steps.append(_Submitted(plan, future))
            sampled = self._feedback.take() if self.num_ranks > 1 else []
        return future, wire.encode(wire.Step(plan, sampled))

    def ask(self, message: wire.ToRank) -> tuple[Future[list[Answer]], bytes]:
        """A question to all ranks, one at a time: a future of their answers in the order of ranks, and the message."""
        future: Future[list[Answer]] = Future()
        with self._lock:
            self._check()
            self._answers = {}
            self._question = future
        return future, wire.encode(message)

    def answer(self, rank: int, said: wire.FromRank) -> Trouble | None:
        """Take in what a rank said. Where it is trouble, the caller finds out what is behind it and calls `fail`.
        Events and log lines are not for the ledger."""
        match said:
            case wire.Stepped(result=result):
                self._stepped(result)
            case wire.StepFailed(step_id=step_id, error=error, secondary=secondary):
                rebuilt = error.rebuild()
                if self.num_ranks > 1:
                    return Trouble(rank, rebuilt, _sort(secondary))
                self._step_failed(step_id, rebuilt)
            case wire.Failed(error=error, secondary=secondary):
                return Trouble(rank, error.rebuild(), _sort(secondary))
            case wire.Prepared() | wire.Started() | wire.Controlled():
                self._answered(rank, said)
            case _:
                raise TypeError(f"not for the ledger: {said!r}")
        return None

    def fail(self, error: BaseException) -> None:
        """Nothing will run any more: everything under way fails with `error`, and so does what comes. The first error
        counts."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            futures = [step.future for step in self._steps]
            self._steps.clear()
            question, self._question = self._question, None
        for future in futures:
            future.set_exception(error)
        if question is not None:
            question.set_exception(error)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _stepped(self, result: StepResult) -> None:
        with self._lock:
            if not self._steps or self._steps[0].plan.step_id != result.step_id:
                return  # of a step that failed with an earlier one
            plan, future = self._steps.popleft()
            self.progress += 1
            if self.num_ranks > 1:
                self._feedback.record(plan, result)
        future.set_result(result)

    def _step_failed(self, step_id: int, error: Exception) -> None:
        """A step that fails fails its successors that are under way."""
        with self._lock:
            if not self._steps or self._steps[0].plan.step_id != step_id:
                return
            futures = [step.future for step in self._steps]
            self._steps.clear()
            self.progress += 1
        for future in futures:
            future.set_exception(error)

    def _answered(self, rank: int, answer: Answer) -> None:
        with self._lock:
            self._answers[rank] = answer
            if len(self._answers) < self.num_ranks or self._question is None:
                return
            question, self._question = self._question, None
            self.progress += 1
            answers = [self._answers[rank] for rank in sorted(self._answers)]
        question.set_result(answers)


def _sort(secondary: bool) -> Sort:
    return Sort.MISSED_A_PEER if secondary else Sort.FAILED


def merge(infos: Sequence[ExecutorInfo]) -> ExecutorInfo:
    """What ranks say of themselves, as one: a block is in all of them, and a start takes as long as the slowest."""
    first = infos[0]
    kv = msgspec.structs.replace(first.kv, bytes_per_block=sum(info.kv.bytes_per_block for info in infos))
    selections = dict.fromkeys(selection for info in infos for selection in info.selections)
    parts = dict.fromkeys(part for info in infos for part in info.timings)
    return msgspec.structs.replace(
        first,
        kv=kv,
        selections=tuple(selections),
        timings={part: max(info.timings.get(part, 0.0) for info in infos) for part in parts},
    )

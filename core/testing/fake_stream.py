"""`FakeStream`: a device that is slow on purpose, on the CPU, for tests of what runs ahead of a device.

Work waits in a queue and runs as late as it may: when somebody waits for it. `eagerness` makes some of it run earlier,
by chance. So what the host changes too early, or reads too early, is wrong in a test as it would be on a GPU.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import torch
from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.executor import Executor, ExecutorEvent, ExecutorInfo
from interlace.messages import StepPlan, StepResult
from interlace.spec import ResolvedSpec
from interlace.worker.streams import Completion, Stream, Work
from interlace.worker.worker import Worker


class FakeCompletion(Completion):
    """Work in the queue of a `FakeStream`."""

    def __init__(self, stream: FakeStream, work: Work) -> None:
        self._stream = stream
        self.work: Work | None = work
        self.error: BaseException | None = None

    def wait(self) -> None:
        self._stream.run_until(self)
        if self.error is not None:
            raise self.error

    def ready(self) -> bool:
        return self.work is None


class FakeStream(Stream):
    """Runs work late, in order. `failures` says what is to go wrong."""

    def __init__(self, eagerness: float = 0.0, seed: int = 0, max_captures: int = 10**9, peak: int = 0) -> None:
        """`eagerness`: the chance that the oldest waiting work runs whenever something is submitted. `max_captures`:
        further captures fail. `peak`: what `peak_memory` says."""
        self.device = torch.device("cpu")
        self.failures: dict[int, BaseException] = {}
        """Number of the submission, from 0, → what it fails with instead of running."""
        self.num_submitted = 0
        self.num_captured = 0
        self.num_replayed = 0
        self.most_waiting = 0
        self.broken: BaseException | None = None
        """Raised by `synchronize`, as by a device that does no more work."""
        self._eagerness = eagerness
        self._random = random.Random(seed)
        self._max_captures = max_captures
        self._peak = peak
        self._waiting: deque[FakeCompletion] = deque()

    def submit(self, work: Work) -> Completion:
        error = self.failures.get(self.num_submitted)

        def fail() -> None:
            assert error is not None
            raise error

        completion = FakeCompletion(self, work if error is None else fail)
        self.num_submitted += 1
        self._waiting.append(completion)
        self.most_waiting = max(self.most_waiting, len(self._waiting))
        while self._waiting and self._random.random() < self._eagerness:
            self._run_oldest()
        return completion

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def capture(self, work: Work) -> Work:
        self.synchronize()
        if self.num_captured >= self._max_captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.num_captured += 1
        work()

        def replay() -> None:
            self.num_replayed += 1
            work()

        return replay

    def synchronize(self) -> None:
        while self._waiting:
            self._run_oldest()
        if self.broken is not None:
            raise self.broken

    def peak_memory(self, work: Work) -> int:
        self.synchronize()
        work()
        return self._peak

    def close(self) -> None:
        pass

    def run_until(self, completion: FakeCompletion) -> None:
        """Run what is waiting, up to and including this."""
        while completion.work is not None:
            self._run_oldest()

    def _run_oldest(self) -> None:
        oldest = self._waiting.popleft()
        work, oldest.work = oldest.work, None
        assert work is not None
        try:
            work()
        except Exception as error:
            oldest.error = error


class AheadExecutor(Executor):
    """One worker that runs ahead of a `FakeStream`, as it would of a GPU; may be named in a spec."""

    class Options(BaseModel):
        """Options of the executor."""

        model_config = ConfigDict(extra="forbid")

        eagerness: float = Field(default=0.0, ge=0, lt=1, description="As for `FakeStream`.")

    def __init__(self, options: BaseModel, stream: FakeStream | None = None) -> None:
        super().__init__(options)
        self.stream = stream or FakeStream(self.options.eagerness)
        self._worker: Worker | None = None

    def start(self, spec: ResolvedSpec, on_event: Callable[[ExecutorEvent], None]) -> ExecutorInfo:
        self._worker = Worker(spec, on_event, stream=self.stream)
        return self._worker.start()

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        if self._worker is None:
            raise RuntimeError("the executor was not started, or was shut down")
        return self._worker.submit(plan)

    def check_health(self) -> None:
        if self._worker is not None:
            self._worker.check_health()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

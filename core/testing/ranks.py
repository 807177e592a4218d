"""Ranks as threads of one process, for tests of models and workers.

    results = ThreadedParallel.run(2, work)                    # work(rank) on two tensor ranks
    results = ThreadedParallel.run(2, work, num_stages=3)      # on six ranks, stage by stage

`ThreadedRanks` is an executor made of such ranks: the protocol of several ranks at its smallest.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import torch
from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.executor import Executor, ExecutorEvent, ExecutorInfo
from interlace.interfaces.model import Parallel
from interlace.messages import StepPlan, StepResult
from interlace.spec import ResolvedSpec
from interlace.worker.feedback import Feedback
from interlace.worker.place import Place
from interlace.worker.worker import Worker

Result = TypeVar("Result")
_PATIENCE_S = 60.0


class _Hall:
    """Where the ranks of one model meet."""

    def __init__(self, size: int, num_stages: int) -> None:
        self.barriers = [threading.Barrier(size, timeout=_PATIENCE_S) for _ in range(num_stages)]
        self.boards: list[list[Any]] = [[None] * size for _ in range(num_stages)]
        self.pipes: dict[tuple[int, int], queue.SimpleQueue[Any]] = {
            (stage, rank): queue.SimpleQueue() for stage in range(num_stages) for rank in range(size)
        }

    def leave(self) -> None:
        """A rank is gone: nobody is to wait for it."""
        for barrier in self.barriers:
            barrier.abort()
        for pipe in self.pipes.values():
            pipe.put(None)


class ThreadedParallel(Parallel):
    """A rank that meets the others in memory. Sums are added up in the order of ranks, so they are the same bits
    everywhere; what is sent is a copy."""

    def __init__(self, place: Place, hall: _Hall) -> None:
        self.rank, self.size = place.tensor_rank, place.tensor_size
        self.stage, self.num_stages, self.stage_layers = place.stage, place.num_stages, place.stage_layers
        self.place = place
        self._hall = hall

    @classmethod
    def make(cls, size: int, num_stages: int = 1) -> list[ThreadedParallel]:
        """All ranks, stage by stage."""
        hall = _Hall(size, num_stages)
        return [cls(Place.of(rank, size, num_stages), hall) for rank in range(size * num_stages)]

    @classmethod
    def run(cls, size: int, work: Callable[[Parallel], Result], num_stages: int = 1) -> list[Result]:
        """The results of all ranks, each on a thread of its own. If one raises, the others are not left waiting, and
        its error is raised here."""
        ranks = cls.make(size, num_stages)

        def run_rank(rank: ThreadedParallel) -> Result:
            try:
                return work(rank)
            except BaseException:
                rank.leave()
                raise

        with ThreadPoolExecutor(len(ranks)) as pool:
            futures = [pool.submit(run_rank, rank) for rank in ranks]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, _LEFT)), errors[0])
        return [future.result() for future in futures]

    def leave(self) -> None:
        """Do not meet anybody any more: their calls raise."""
        self._hall.leave()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(0) if self.size > 1 else x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int] | None = None) -> torch.Tensor:
        if self.size == 1:
            return x
        parts = self._exchange(x)
        found, said = [part.shape[-1] for part in parts], list(widths or [x.shape[-1]] * self.size)
        assert found == said, f"ranks have {found} columns to gather, rank {self.rank} expects {said}"
        return torch.cat(parts, dim=-1)

    def send(self, hidden: torch.Tensor, residual: torch.Tensor) -> None:
        if self.is_last_stage:
            super().send(hidden, residual)
        self._hall.pipes[self.stage + 1, self.rank].put((hidden.clone(), residual.clone()))

    def receive(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_first_stage:
            super().receive(num_tokens, hidden_size, dtype)
        received = self._hall.pipes[self.stage, self.rank].get(timeout=_PATIENCE_S)
        if received is None:
            raise BrokenPipeError("another rank is gone")
        for tensor in received:
            expected = torch.Size((num_tokens, hidden_size)), dtype
            assert (tensor.shape, tensor.dtype) == expected, f"{tensor.shape} {tensor.dtype} instead of {expected}"
        hidden, residual = received
        return hidden, residual

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        board, barrier = self._hall.boards[self.stage], self._hall.barriers[self.stage]
        board[self.rank] = x
        barrier.wait()
        everyone: list[torch.Tensor] = list(board)
        barrier.wait()  # nobody may post again before all have read
        return everyone


_LEFT = (threading.BrokenBarrierError, BrokenPipeError)


class ThreadedRanks(Executor):
    """`Worker`s on threads. A step that fails on any rank is the end: the others may be in the middle of it."""

    class Options(BaseModel):
        """Options of the threaded ranks."""

        model_config = ConfigDict(extra="forbid")

        tensor_parallel: int = Field(default=1, ge=1, description="Ranks that share each layer.")
        pipeline_parallel: int = Field(default=1, ge=1, description="Stages the layers are dealt to.")

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        self.workers: list[Worker] = []
        self.infos: list[ExecutorInfo] = []
        self._threads: list[ThreadPoolExecutor] = []
        self._ranks: list[ThreadedParallel] = []
        self._feedback = Feedback()
        self._failure: BaseException | None = None

    def places(self, spec: ResolvedSpec) -> list[Place]:
        size, stages = self.options.tensor_parallel, self.options.pipeline_parallel
        return [Place.of(rank, size, stages) for rank in range(size * stages)]

    def start(self, spec: ResolvedSpec, on_event: Callable[[ExecutorEvent], None]) -> ExecutorInfo:
        self._ranks = ThreadedParallel.make(self.options.tensor_parallel, self.options.pipeline_parallel)
        self.workers = [Worker(spec, on_event, place=rank.place, parallel=rank) for rank in self._ranks]
        self._threads = [ThreadPoolExecutor(1, f"rank {rank.place.rank}") for rank in self._ranks]
        num_blocks = min(self._on_all(lambda worker: worker.prepare()))
        self.infos = self._on_all(lambda worker: worker.start(num_blocks=num_blocks))
        info = self.infos[self._sampling]
        nbytes = sum(rank.kv.bytes_per_block for rank in self.infos)
        return msgspec.structs.replace(info, kv=msgspec.structs.replace(info.kv, bytes_per_block=nbytes))

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        answer: Future[StepResult] = Future()
        sampled = self._feedback.take() if len(self.workers) > 1 else []

        def run(worker: Worker) -> StepResult:
            try:
                return worker.execute(plan, sampled)
            except BaseException as error:
                if not isinstance(error, _LEFT):
                    self._failure = self._failure or error
                self._ranks[0].leave()
                raise

        def settle(step: Future[StepResult]) -> None:
            error = self._failure or step.exception()
            if error is not None:
                answer.set_exception(error)
                return
            self._feedback.record(plan, step.result())
            answer.set_result(step.result())

        steps = [thread.submit(run, worker) for thread, worker in zip(self._threads, self.workers, strict=True)]
        steps[self._sampling].add_done_callback(settle)
        return answer

    def check_health(self) -> None:
        if self._failure is not None:
            raise RuntimeError("a rank failed in the middle of a step") from self._failure

    def shutdown(self) -> None:
        if self._ranks:
            self._ranks[0].leave()
        for thread in self._threads:
            thread.shutdown()
        for worker in self.workers:
            worker.shutdown()
        self.workers, self._threads = [], []

    @property
    def _sampling(self) -> int:
        return next(number for number, rank in enumerate(self._ranks) if rank.place.samples)

    def _on_all(self, work: Callable[[Worker], Result]) -> list[Result]:
        """Do something on all ranks at a time; raises the first rank's error after all have ended."""
        futures = [thread.submit(work, worker) for thread, worker in zip(self._threads, self.workers, strict=True)]
        return [future.result() for future in futures]

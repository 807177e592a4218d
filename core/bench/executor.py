"""What an executor adds to a step: handing out the plan, and bringing back the result."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from interlace.assemble import start_executor
from interlace.bench.step import WARM_UP, StepPlans
from interlace.clock import MonotonicClock
from interlace.interfaces.executor import Executor, ExecutorInfo
from interlace.messages import StepPlan
from interlace.spec import ResolvedSpec

CONTEXT = 16
"""Tokens of each request before the steps: few, so that the model takes as little time as it can."""


class ExecutorSteps(msgspec.Struct, frozen=True, kw_only=True):
    """Decode steps of so many requests, one after the other; medians."""

    requests: int
    step_us: float
    """From the plan to its result, as the engine waits for it."""
    worker_us: float
    """Of those, what the worker that samples says it has spent."""
    overhead_us: float
    """The difference: median of the steps' differences."""
    plan_bytes: int
    """Of a step's plan, as msgpack."""
    result_bytes: int
    exchanged_bytes: dict[str, int]
    """By kind of exchange: bytes that one rank hands to others in a step, the most of all ranks."""


class ExecutorReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `interlace bench executor`."""

    executor: str
    options: dict[str, Any]
    steps: list[ExecutorSteps]


def measure_executor(spec: ResolvedSpec, requests: Sequence[int], steps: int) -> Iterator[ExecutorSteps]:
    """Start the executor for each number of requests, since a fresh one holds no request, and time `steps` steps."""
    for count in requests:
        executor, info = start_executor(spec, lambda event: None)
        try:
            yield _measure(executor, info, spec, count, steps)
        finally:
            executor.shutdown()


def _measure(executor: Executor, info: ExecutorInfo, spec: ResolvedSpec, requests: int, steps: int) -> ExecutorSteps:
    plans = StepPlans(spec, info.kv, requests, CONTEXT, steps)
    for plan in plans.prefill():
        executor.submit(plan).result()
    for _ in range(WARM_UP):
        executor.submit(plans.decode()).result()
    before = _exchanged(executor)
    now = MonotonicClock().now
    times: list[float] = []
    durations: list[float] = []
    plan = plans.decode()
    for _ in range(steps):
        began = now()
        result = executor.submit(plan).result()
        times.append(now() - began)
        durations.append(result.duration)
        plan = plans.decode()
    after = _exchanged(executor)
    return ExecutorSteps(
        requests=requests,
        step_us=1e6 * statistics.median(times),
        worker_us=1e6 * statistics.median(durations),
        overhead_us=1e6 * statistics.median(t - d for t, d in zip(times, durations, strict=True)),
        plan_bytes=_size(plan),
        result_bytes=_size(result),
        exchanged_bytes={kind: (after[kind] - before.get(kind, 0)) // steps for kind in after},
    )


def _exchanged(executor: Executor) -> dict[str, int]:
    """By kind: bytes handed to other ranks since the start, the most of all ranks; empty where there are no ranks."""
    try:
        ranks = executor.control("ranks")
    except ValueError:
        return {}
    most: dict[str, int] = {}
    for rank in ranks:
        for kind, nbytes in rank["exchanged_bytes"].items():
            most[kind] = max(most.get(kind, 0), nbytes)
    return most


def _size(message: StepPlan | msgspec.Struct) -> int:
    return len(msgspec.msgpack.encode(message))

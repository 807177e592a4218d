"""Routers against each other: the same shared-prefix traffic through the same replicas, one router after the other."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

import msgspec

from interlace.bench.metrics import percentile
from interlace.bench.workloads import WorkItem, check_fits
from interlace.clock import Clock, MonotonicClock
from interlace.config import LoadedSettings
from interlace.engine.front import Front, Observer
from interlace.engine.output_processor import Processed
from interlace.engine.output_state import ActiveRequest
from interlace.errors import RequestFailedError
from interlace.messages import SamplingParams, StepOutput

WARMUP_REQUESTS = 4


class SharedPrefixes(msgspec.Struct, frozen=True, kw_only=True):
    """A workload: `groups` beginnings of `prefix_len` tokens, each followed `per_group` times by `own_len` tokens that
    no other prompt has; in random order."""

    groups: int
    per_group: int
    prefix_len: int
    own_len: int
    output_len: int

    def items(self, vocab_size: int, seed: int) -> list[WorkItem]:
        draw = random.Random(seed)
        found = []
        for _ in range(self.groups):
            prefix = draw.choices(range(vocab_size), k=self.prefix_len)
            found += [
                WorkItem(prefix + draw.choices(range(vocab_size), k=self.own_len), self.output_len)
                for _ in range(self.per_group)
            ]
        draw.shuffle(found)
        return found


class RouterRun(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one router."""

    router: str
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    hit_rate: float
    """Share of the prompt tokens that were found in a prefix cache."""
    ttft_p50_s: float
    ttft_p99_s: float
    requests_of_replicas: list[int]
    """How many requests each replica got."""
    kv_blocks: list[int]
    """KV blocks of each replica."""


class _Finished:
    """The sink of a run: who has ended."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ended: list[ActiveRequest] = []

    def deliver(self, requests: list[ActiveRequest]) -> None:
        with self._changed:
            self._ended += requests
            self._changed.notify_all()

    def wait(self) -> list[ActiveRequest]:
        """Those that have ended since the last call, at least one."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended)
            ended, self._ended = self._ended, []
        return ended


class _Served(Observer):
    """How many requests ended at each replica."""

    def __init__(self, count: int) -> None:
        self.counts = [0] * count

    def on_step(self, step: StepOutput, done: Processed) -> None:
        self.counts[step.engine] += len(done.summaries)


def compare_routers(
    load: Callable[[str], LoadedSettings],
    routers: Sequence[str],
    workload: SharedPrefixes,
    *,
    concurrency: int,
    repeat: int,
    seed: int,
    say: Callable[[str], None],
    clock: Clock | None = None,
) -> list[RouterRun]:
    """Fresh replicas for each router, in turns, `repeat` times; the run with the median duration of each counts.

    `load(name)` gives the settings with that router. `concurrency` requests are unfinished at any time. `say` is told
    how it goes. Raises `WorkloadError` if the workload does not fit the model."""
    clock = clock or MonotonicClock()
    runs: dict[str, list[RouterRun]] = {name: [] for name in routers}
    for _ in range(repeat):
        for name in routers:
            front = Front.open(load(name), clock=clock)
            try:
                found = _run(front, name, workload, concurrency, seed, clock)
            finally:
                front.shutdown()
            say(f"{name}: {found.duration_s:.2f} s, {found.hit_rate:.1%} of the prompt tokens found")
            runs[name].append(found)
    return [sorted(found, key=lambda run: run.duration_s)[(len(found) - 1) // 2] for found in runs.values()]


def _run(front: Front, name: str, workload: SharedPrefixes, concurrency: int, seed: int, clock: Clock) -> RouterRun:
    vocab_size = front.spec.model_config.vocab_size
    items = workload.items(vocab_size, seed)
    check_fits(items, front.spec.max_model_len, vocab_size)
    _drive(front, items[:WARMUP_REQUESTS] * len(front.infos), concurrency)
    front.control("reset_prefix_cache")
    served = _Served(len(front.infos))
    front.observe(served)
    began = clock.now()
    requests = _drive(front, items, concurrency)
    duration = clock.now() - began
    usages = [front.whole(request).usage for request in requests]
    waits = sorted(request.metrics.ttft or 0.0 for request in requests)
    return RouterRun(
        router=name,
        duration_s=duration,
        requests_per_s=len(items) / duration,
        output_tokens_per_s=sum(usage.completion_tokens for usage in usages) / duration,
        hit_rate=sum(usage.cached_tokens for usage in usages) / sum(usage.prompt_tokens for usage in usages),
        ttft_p50_s=percentile(waits, 0.5),
        ttft_p99_s=percentile(waits, 0.99),
        requests_of_replicas=served.counts,
        kv_blocks=[info.kv.num_blocks - 1 for info in front.infos],
    )


def _drive(front: Front, items: Sequence[WorkItem], concurrency: int) -> list[ActiveRequest]:
    """Run all items, so many at a time; in the order of `items`. Raises `RequestFailedError`."""
    sink = _Finished()
    requests: list[ActiveRequest] = []
    running = 0
    while running or len(requests) < len(items):
        while running < concurrency and len(requests) < len(items):
            item = items[len(requests)]
            params = SamplingParams(temperature=0.0, max_tokens=item.max_tokens, ignore_eos=True, detokenize=False)
            requests += front.submit([front.prepare(item.prompt_token_ids, params)], sink, streaming=False)
            running += 1
        for request in sink.wait():
            running -= 1
            if error := front.whole(request).error:
                raise RequestFailedError(f"{request.id} failed: {error}")
    return requests

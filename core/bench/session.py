"""A started engine to measure: `Session` runs workloads through the same front that `LLM` uses, and takes the times."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from interlace.bench.machine import process_age
from interlace.bench.metrics import Run, Timeline
from interlace.bench.workloads import WorkItem, random_items
from interlace.clock import Clock, MonotonicClock
from interlace.config import LoadedSettings
from interlace.engine.front import Front
from interlace.engine.output_state import ActiveRequest
from interlace.errors import InterlaceError, RequestFailedError
from interlace.hookspecs import hookimpl
from interlace.messages import SamplingParams

if TYPE_CHECKING:
    from interlace.messages import StepStats

FIRST_PROMPT_LEN = 32
"""Tokens of the very first prompt, which times the first token after the start."""
OWN_ACCOUNT = "events:StepCounter:given in code"
"""Under this name the time of the benchmark's own subscriber is accounted; it is not part of the engine."""
WARMUP_TOKENS = 8
"""Most tokens generated per warm-up request."""


class Startup(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds from the start of the process to the first token, by part."""

    python_s: float | None
    """Interpreter, command line and settings; None where the system does not tell."""
    config_s: float
    """Plugins, the model's configuration, its tokenizer."""
    import_s: float
    """torch and the engine's own modules, and choosing what runs; in a child, its start, too."""
    weights_s: float
    """Building the model, reading, converting and packing its weights."""
    cache_s: float
    """Allocating the KV cache and the batch."""
    first_token_s: float
    """From handing in a prompt of 32 tokens to the first token of its answer."""
    total_s: float


class StepCounter:
    """A plugin given in code that counts what the engine reports per step."""

    def __init__(self) -> None:
        self.steps = 0
        self.preemptions = 0
        self.plugin_seconds: dict[str, float] = {}

        self._prefix: dict[int, tuple[int, int]] = {}  # replica → tokens looked up and found

    @property
    def prefix_queries(self) -> int:
        return sum(queries for queries, _ in self._prefix.values())

    @property
    def prefix_hits(self) -> int:
        return sum(hits for _, hits in self._prefix.values())

    @hookimpl
    def on_step(self, stats: StepStats) -> None:
        """Add one step; the prefix counts are totals of an engine already."""
        self.steps += 1
        self.preemptions += stats.num_preemptions
        self._prefix[stats.engine] = (stats.prefix_queries, stats.prefix_hits)
        for name, seconds in stats.plugin_seconds.items():
            if name != OWN_ACCOUNT:
                self.plugin_seconds[name] = self.plugin_seconds.get(name, 0.0) + seconds


class Recorder:
    """The sink of one run: notes when each token of each request came."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._times: dict[ActiveRequest, list[float]] = {}
        self._ended: set[ActiveRequest] = set()

    def deliver(self, requests: list[ActiveRequest]) -> None:
        """News of a step: its tokens have the time the engine gave the step."""
        with self._changed:
            for request in requests:
                times = self._times.setdefault(request, [])
                now = request.metrics.last_token_time
                if now is not None:
                    times.extend([now] * (request.num_output_tokens - len(times)))
                if request.finished or request.failure is not None:
                    self._ended.add(request)
            self._changed.notify_all()

    def wait(self, requests: Sequence[ActiveRequest]) -> list[list[float]]:
        """Token times of `requests`, once all of them have ended."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._ended) == len(requests))
            return [self._times.get(request, []) for request in requests]


class Session:
    """One engine, started for measuring. A context manager."""

    def __init__(
        self,
        loaded: LoadedSettings,
        *,
        detokenize: bool = True,
        processors: Mapping[str, Mapping[str, Any]] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Start the engine and make it answer once. Every request names the logits `processors`, with these arguments.

        Raises what `LLM` raises."""
        self._clock = clock or MonotonicClock()
        self._counter = StepCounter()
        self._detokenize = detokenize
        self._processors = {name: dict(arguments) for name, arguments in (processors or {}).items()} or None
        age = process_age()
        self.front = Front.open(loaded, plugins=[self._counter], clock=self._clock)
        try:
            self.startup = self._measure_start(age)
        except BaseException:
            self.front.shutdown()
            raise

    def _measure_start(self, age: float | None) -> Startup:
        timings = self.front.timings
        config, weights, cache = (timings.get(part, 0.0) for part in ("assemble", "weights", "cache"))
        vocab_size = self.front.spec.model_config.vocab_size
        length = min(FIRST_PROMPT_LEN, self.front.spec.max_model_len - 1)
        first = self.run(random_items(1, input_len=length, output_len=1, vocab_size=vocab_size, seed=0))
        first_token = first.timelines[0].tokens[0] - first.started
        return Startup(
            python_s=age,
            config_s=config,
            import_s=timings["total"] - config - weights - cache,
            weights_s=weights,
            cache_s=cache,
            first_token_s=first_token,
            total_s=(age or 0.0) + timings["total"] + first_token,
        )

    def warm_up(self, items: Sequence[WorkItem]) -> None:
        """Run requests without taking times, with short answers."""
        if items:
            self.run([WorkItem(item.prompt_token_ids, min(item.max_tokens, WARMUP_TOKENS)) for item in items])

    def run(self, items: Sequence[WorkItem]) -> Run:
        """All requests at once, greedy, each with exactly its number of tokens, from an empty prefix cache.

        Raises `RequestFailedError` if one of them fails, and `EngineDeadError`."""
        front, counter = self.front, self._counter
        # Answered between steps, so every step so far is counted.
        front.control("reset_prefix_cache")
        before = (counter.steps, counter.preemptions, counter.prefix_queries, counter.prefix_hits)
        spent = dict(counter.plugin_seconds)
        recorder = Recorder()
        started = self._clock.now()
        prepared = [front.prepare(item.prompt_token_ids, self._params(item), index=i) for i, item in enumerate(items)]
        requests = front.submit(prepared, recorder, streaming=True)
        try:
            times = recorder.wait(requests)
        except BaseException:
            front.abort(requests)
            raise
        timelines = [self._timeline(*row) for row in zip(items, requests, times, strict=True)]
        front.health()  # the counter hears of a step after the recorder
        after = (counter.steps, counter.preemptions, counter.prefix_queries, counter.prefix_hits)
        steps, preemptions, queries, hits = (now - then for now, then in zip(after, before, strict=True))
        return Run(
            started=started,
            timelines=timelines,
            steps=steps,
            preemptions=preemptions,
            prefix_queries=queries,
            prefix_hits=hits,
            plugin_seconds={name: now - spent.get(name, 0.0) for name, now in counter.plugin_seconds.items()},
        )

    def _params(self, item: WorkItem) -> SamplingParams:
        return SamplingParams(
            temperature=0.0,
            max_tokens=item.max_tokens,
            ignore_eos=True,
            detokenize=self._detokenize,
            logits_processors=self._processors,
        )

    def _timeline(self, item: WorkItem, request: ActiveRequest, times: list[float]) -> Timeline:
        output = self.front.whole(request)
        if output.error is not None:
            raise RequestFailedError(f"{output.request_id} failed: {output.error}")
        if len(times) != item.max_tokens:
            raise InterlaceError(
                f"{output.request_id} gave {len(times)} tokens instead of {item.max_tokens}: the figures would be wrong"
            )
        return Timeline(
            arrival=output.metrics.arrival_time,
            tokens=times,
            num_prompt_tokens=len(item.prompt_token_ids),
            num_cached_tokens=output.usage.cached_tokens,
        )

    def close(self) -> None:
        """Stop the engine. May be called twice."""
        self.front.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

"""`Front`: what `LLM`, `AsyncLLM` and the server share on the user's side of the engine client.

It prepares requests, keeps their state, hands each step's news to the sinks, and tells event subscribers what happened.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from interlace.assemble import Assembly, assemble
from interlace.clock import Clock, MonotonicClock
from interlace.config import LoadedSettings, effective
from interlace.engine.client import EngineHealth
from interlace.engine.input_processor import InputProcessor, PreparedRequest, Prompt, RequestOptions
from interlace.engine.output_processor import OutputProcessor, Processed
from interlace.engine.output_state import ActiveRequest, Sink
from interlace.engine.startup import StartupProgress
from interlace.errors import EngineDeadError
from interlace.interfaces.executor import ExecutorEvent, ExecutorInfo
from interlace.messages import RequestOutput, SamplingParams, StepOutput

logger = logging.getLogger(__name__)


class Observer:
    """A part of this process that watches requests and steps, such as the server's metrics; methods may be left out."""

    def on_submit(self, requests: list[ActiveRequest]) -> None:
        """Requests were handed to the engine. Called by whoever submits, in their thread and context."""

    def on_step(self, step: StepOutput, done: Processed) -> None:
        """A step was processed. Called from the engine client's thread, after its news were delivered; must be quick.
        `done.summaries` are the requests that ended with it."""


class Front:
    """One started engine seen from the user's side. Thread-safe."""

    def __init__(self, assembly: Assembly, began: float | None = None) -> None:
        """Start the engine of `assembly` and wait until it is ready. Raises the true cause when it cannot start.

        `began` is when assembling began, for the report of the start."""
        self.loaded = assembly.loaded
        self.spec = assembly.spec
        self.tokenizer = assembly.tokenizer
        self.clock = assembly.clock
        self._client = assembly.client
        self._events = assembly.events
        self._inputs = InputProcessor(assembly.spec, assembly.tokenizer, assembly.clock)
        self._outputs = OutputProcessor(assembly.tokenizer)
        self._ids = itertools.count()
        self._observers: tuple[Observer, ...] = ()
        self._closing = threading.Lock()
        self._closed = False
        assembled = self.clock.now()
        began = assembled if began is None else began
        self._progress = StartupProgress()
        try:
            with self._progress:
                self.info: ExecutorInfo = self._client.start(self._on_output, self._on_death, self._on_event)
        except BaseException:
            self._client.shutdown()
            raise
        self.timings = {"assemble": assembled - began, **self.info.timings, "total": self.clock.now() - began}
        """Seconds of the start by part; `total` also has what no part claims."""
        for subject, text in self.report():
            logger.info("%s: %s", subject, text)
        self._events.on_engine_start(effective(assembly.loaded))

    @classmethod
    def open(
        cls,
        loaded: LoadedSettings,
        *,
        default_process: str = "inline",
        plugins: Sequence[Any] = (),
        clock: Clock | None = None,
    ) -> Self:
        """Assemble and start an engine. `default_process`: where it runs when the settings leave it open."""
        clock = clock or MonotonicClock()
        began = clock.now()
        return cls(assemble(loaded, default_process=default_process, clock=clock, plugins=plugins), began)

    # ── Requests ────────────────────────────────────────────────────────────────────────────────────────────────

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        options: RequestOptions | None = None,
        index: int | None = None,
        chat_options: Mapping[str, Any] | None = None,
    ) -> PreparedRequest:
        """Validate and tokenize; nothing reaches the engine. Raises `InvalidRequestError`."""
        return self._inputs.prepare(
            prompt,
            params,
            request_id=f"request-{next(self._ids)}" if request_id is None else request_id,
            options=options,
            index=index,
            chat_options=chat_options,
        )

    def submit(self, prepared: Iterable[PreparedRequest], sink: Sink, *, streaming: bool) -> list[ActiveRequest]:
        """Hand requests to the engine, together: they enter it before the same step.

        `streaming` sinks hear of every step with news, others of the end only. Raises `EngineDeadError`."""
        requests: list[ActiveRequest] = []
        samples = []
        try:
            for one in prepared:
                requests.append(self._outputs.add(one, sink, streaming))
                samples += one.samples
            self._client.add(samples)
        except BaseException:
            for request in requests:
                self._outputs.discard(request)
            raise
        for observer in self._observers:
            self._tell(observer, observer.on_submit, requests)
        return requests

    def take(self, request: ActiveRequest) -> RequestOutput | None:
        """What is new since the last call, or None. Raises `EngineDeadError` if the engine died under the request."""
        return self._outputs.take(request)

    def whole(self, request: ActiveRequest) -> RequestOutput:
        """Everything so far. Raises `EngineDeadError` if the engine died under the request."""
        return self._outputs.whole(request)

    def abort(self, requests: Iterable[ActiveRequest]) -> None:
        """End requests now; what they have so far stays. Finished ones are left alone."""
        ids = []
        for request in requests:
            if not request.finished and request.failure is None:
                ids += self._outputs.abort(request, self.clock.now())
        self._abort_in_engine(ids)

    def find(self, request_id: str) -> ActiveRequest | None:
        """The active request of that id."""
        return self._outputs.find(request_id)

    def observe(self, observer: Observer) -> None:
        """Tell `observer` everything from now on. One that raises is logged and told nothing more."""
        self._observers += (observer,)

    @property
    def num_active(self) -> int:
        """Requests between submission and the engine's word that they ended."""
        return self._outputs.num_active

    # ── Engine ──────────────────────────────────────────────────────────────────────────────────────────────────

    def health(self, timeout: float = 5.0) -> EngineHealth:
        """Ask the engine loop. Raises `EngineDeadError` if it is dead or silent for `timeout` seconds."""
        return self._client.health(timeout)

    def control(self, operation: str, **arguments: Any) -> Any:
        """Run a named operation in the engine, between steps (`reset_prefix_cache`, …)."""
        return self._client.control(operation, **arguments)

    def report(self) -> list[tuple[str, str]]:
        """(subject, text) lines that say what runs, what was chosen and why, and how long the start took."""
        spec, kv = self.spec, self.info.kv
        lines = [
            (
                "model",
                f"{spec.model} ({spec.architecture.name}), {spec.dtype} on {spec.device}, "
                f"up to {spec.max_model_len} tokens",
            ),
            ("scheduler", _choice(spec.scheduler.label, spec.scheduler.reason)),
            ("executor", _choice(spec.executor.name, spec.executor.reason)),
        ]
        lines += [(choice.kind, _choice(choice.name, choice.reason)) for choice in self.info.selections]
        size = kv.num_blocks * kv.bytes_per_block / 2**20
        lines.append(("kv cache", f"{kv.num_blocks} blocks of {kv.block_size} tokens, {size:,.0f} MiB"))
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in self.timings.items() if part != "total")
        lines.append(("started in", f"{self.timings['total']:.2f} s ({parts})"))
        return lines

    def shutdown(self) -> None:
        """Stop the engine; unfinished requests fail with `EngineDeadError`. May be called twice."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._events.on_shutdown()
        self._deliver_death(EngineDeadError("the engine was shut down"))
        self._client.shutdown()

    # ── From the engine client's thread ─────────────────────────────────────────────────────────────────────────

    def _on_output(self, step: StepOutput) -> None:
        try:
            done = self._outputs.process(step)
            self._abort_in_engine(done.aborts)
            for sink, requests in done.news.items():
                sink.deliver(requests)
            if step.stats is not None:
                self._events.on_step(step.stats)
            for summary in done.summaries:
                self._events.on_request_finished(summary)
            for observer in self._observers:
                self._tell(observer, observer.on_step, step, done)
        except Exception as error:
            # A bug on this side of the border: without this every waiter would wait for ever.
            logger.exception("step %d could not be processed", step.step_id)
            death = EngineDeadError(f"step {step.step_id} could not be processed: {type(error).__name__}: {error}")
            death.__cause__ = error
            self._deliver_death(death)

    def _tell(self, observer: Observer, method: Callable[..., None], *arguments: Any) -> None:
        try:
            method(*arguments)
        except Exception:
            logger.exception("%s failed and is told nothing more", type(observer).__name__)
            self._observers = tuple(other for other in self._observers if other is not observer)

    def _on_death(self, error: EngineDeadError) -> None:
        logger.error("the engine died: %s", error)
        self._deliver_death(error)

    def _on_event(self, event: ExecutorEvent) -> None:
        if event.kind == "progress":
            self._progress.show(event)
        else:
            logger.warning("executor: %s: %s", event.kind, event.message)

    def _deliver_death(self, error: EngineDeadError) -> None:
        for sink, requests in self._outputs.fail(error).items():
            sink.deliver(requests)

    def _abort_in_engine(self, ids: list[str]) -> None:
        if not ids:
            return
        try:
            self._client.abort(ids)
        except EngineDeadError:
            logger.debug("nothing to abort: the engine is gone")


def _choice(name: str, reason: str) -> str:
    return f"{name} ({reason})" if reason else name

"""`Front`: what `LLM`, `AsyncLLM` and the server share on the user's side of the engine client.

It prepares requests, keeps their state, hands each step's news to the sinks, and tells event subscribers what happened.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Self

import msgspec

from interlace.assemble import Assembly, assemble
from interlace.clock import Clock, MonotonicClock
from interlace.config import LoadedSettings, effective
from interlace.engine.client import EngineHealth
from interlace.engine.input_processor import InputProcessor, PreparedRequest, Prompt, RequestOptions
from interlace.engine.output_processor import OutputProcessor, Processed, raise_failure
from interlace.engine.output_state import ActiveRequest, Sink
from interlace.engine.snapshot import MAX_BLOCKS, MAX_REQUESTS, EngineSnapshot, merge_snapshots
from interlace.engine.startup import StartupProgress, paused_gc
from interlace.errors import EngineDeadError, EngineRestartingError, EngineSilentError, OverloadedError
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
        self._max_waiting = 0
        self._congested: dict[int, bool] = {}  # replica → whether its last step left anyone waiting
        self._closing = threading.Lock()
        self._closed = False
        self.restarts = 0
        """How often a new engine has taken the place of one that died."""
        self.death: Future[EngineDeadError] = Future()
        """Done when the engine died and is not started again; its value is the reason. Never by `shutdown`."""
        self.death.set_running_or_notify_cancel()  # whoever stops waiting does not cancel it for others
        self._client.on_restart, self._client.on_loss = self._on_restart, self._on_loss
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
        supervised: bool = False,
        plugins: Sequence[Any] = (),
        clock: Clock | None = None,
    ) -> Self:
        """Assemble and start an engine. `default_process`: where it runs when the settings leave it open.
        `supervised`: an engine process that dies is started again, as `engine.max_restarts` allows."""
        clock = clock or MonotonicClock()
        began = clock.now()
        with paused_gc():
            parts = assemble(
                loaded, default_process=default_process, supervised=supervised, clock=clock, plugins=plugins
            )
            return cls(parts, began)

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

        `streaming` sinks hear of every step with news, others of the end only. Raises `EngineDeadError`, and
        `OverloadedError` if too many would wait (`limit_waiting`): then none of them was handed over."""
        requests: list[ActiveRequest] = []
        samples = []
        try:
            for one in prepared:
                requests.append(self._outputs.add(one, sink, streaming))
                samples += one.samples
            self._check_room(len(samples))
            self._client.add(samples)
            lost = next((request for request in requests if request.failure is not None), None)
            if lost is not None:  # the engine died meanwhile, and the samples may have reached the one after it
                self._abort_in_engine([sample.id for sample in samples])
                raise_failure(lost)
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

    def limit_waiting(self, most: int) -> None:
        """Let at most `most` samples wait for their first step, beside those that find a seat. 0: no limit."""
        self._max_waiting = most

    def _check_room(self, new: int) -> None:
        if not self._max_waiting:
            return
        # Free seats count, so that a burst which can run at once is not refused; unless it is blocks that are short.
        free = self.num_seats - (self.num_active - self.num_waiting)
        congested = self._congested and all(self._congested.values())
        seats = 0 if congested else max(0, free)
        if self.num_waiting > self._max_waiting + seats:
            raise OverloadedError(
                f"{self.num_waiting - new} requests are waiting already (server.max_waiting = {self._max_waiting}): "
                f"there is no room for {new} more, try again later"
            )

    def observe(self, observer: Observer) -> None:
        """Tell `observer` everything from now on. One that raises is logged and told nothing more."""
        self._observers += (observer,)

    # ── Engine ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def num_active(self) -> int:
        """Engine requests (a request with `n` samples is `n` of them) whose end the engine has not reported. Cheap."""
        return self._outputs.num_active

    @property
    def num_waiting(self) -> int:
        """Of those, how many no step has computed anything of yet: the queue, as seen from here. Cheap."""
        return self._outputs.num_waiting

    @property
    def infos(self) -> tuple[ExecutorInfo, ...]:
        """What each replica's executor offers, by index: one entry where there is one engine."""
        return self._client.infos or (self.info,)

    @property
    def num_seats(self) -> int:
        """How many samples can run at the same time, over all replicas."""
        return self.loaded.settings.scheduler.max_num_seqs * len(self.infos)

    def health(self, timeout: float = 5.0) -> EngineHealth:
        """Ask the engine loop. A loop that is silent for `timeout` seconds is `degraded` (a step may take long; a hung
        one is ended after `engine.step_timeout_s`); one that is gone is `restarting` or `dead`. Never raises."""
        if self.death.done():
            return self._dead_health(self.death.result())
        try:
            return self._client.health(timeout)
        except EngineSilentError as error:
            return EngineHealth(status="degraded", reason=str(error), restarts=self.restarts)
        except EngineDeadError as error:
            return self._dead_health(error)

    def _dead_health(self, error: EngineDeadError) -> EngineHealth:
        cause = error.__cause__
        return EngineHealth(
            status="dead",
            reason=str(error),
            restarts=self.restarts,
            last_cause=str(error) if cause is None else f"{type(cause).__name__}: {cause}",
        )

    def snapshot(self, max_requests: int = MAX_REQUESTS, max_blocks: int = MAX_BLOCKS) -> EngineSnapshot:
        """The inside of the engine between two steps; of all replicas that work, where there are several. Raises
        `EngineDeadError`; waits for the step under way."""
        count = len(self.infos)
        answer = self._client.control("snapshot", max_requests=max_requests, max_blocks=max(1, max_blocks // count))
        if isinstance(answer, list):
            found = merge_snapshots(msgspec.convert(answer, list[EngineSnapshot | None]), max_requests)
        else:
            found = msgspec.convert(answer, EngineSnapshot)
        return msgspec.structs.replace(found, plugins=self._plugins_in_force())

    def _plugins_in_force(self) -> dict[str, list[str]]:
        spec = self.spec
        named = [("models", spec.architecture.name), ("checkpoints", spec.checkpoint.name)]
        named += [("schedulers", spec.scheduler.label), ("executors", spec.executor.name)]
        named += [(choice.kind, choice.name) for choice in self.info.selections]
        named += [("logits_processors", part.name) for part in spec.logits_processors]
        if spec.router is not None and len(self.infos) > 1:
            named.append(("routers", spec.router.name))
        found: dict[str, list[str]] = {}
        for kind, name in named:
            if name not in found.setdefault(kind, []):
                found[kind].append(name)
        return found

    def control(self, operation: str, **arguments: Any) -> Any:
        """Run a named operation in the engine, between steps (`reset_prefix_cache`, …). With replicas, in all of them:
        the answer is a list."""
        return self._client.control(operation, **arguments)

    def report(self) -> list[tuple[str, str]]:
        """(subject, text) lines that say what runs, what was chosen and why, and how long the start took."""
        spec = self.spec
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
        lines += self._client.describe()
        lines += [("kv cache", text) for text in self._kv_caches()]
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in self.timings.items() if part != "total")
        lines.append(("started in", f"{self.timings['total']:.2f} s ({parts})"))
        return lines

    def _kv_caches(self) -> list[str]:
        """What each replica's cache holds; those that hold alike said once."""
        each = " in each replica" if len(self.infos) > 1 else ""
        texts = []
        for info in self.infos:
            kv = info.kv
            size = kv.num_blocks * kv.bytes_per_block / 2**20
            texts.append(f"{kv.num_blocks} blocks of {kv.block_size} tokens, {size:,.0f} MiB{each}")
        return list(dict.fromkeys(texts))

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
                self._congested[step.engine] = step.stats.num_waiting > 0
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
            self._lose_engine(death)

    def _tell(self, observer: Observer, method: Callable[..., None], *arguments: Any) -> None:
        try:
            method(*arguments)
        except Exception:
            logger.exception("%s failed and is told nothing more", type(observer).__name__)
            self._observers = tuple(other for other in self._observers if other is not observer)

    def _on_death(self, error: EngineDeadError) -> None:
        logger.error("the engine died: %s", error, exc_info=error)
        self._lose_engine(error)

    def _on_loss(self, error: EngineDeadError, engine_ids: list[str], engine: int) -> None:
        logger.error("a replica died, with %d samples of requests: %s", len(engine_ids), error, exc_info=error)
        self._congested.pop(engine, None)
        self._fail(error, engine_ids, engine)

    def _on_restart(self, info: ExecutorInfo) -> None:
        self.info = info
        self.restarts += 1

    def _lose_engine(self, error: EngineDeadError) -> None:
        """Everything that runs is lost, and, unless a new engine is being started, everything that may come."""
        self._fail(error)
        if not isinstance(error, EngineRestartingError) and not self.death.done():
            self.death.set_result(error)

    def _fail(self, error: EngineDeadError, engine_ids: list[str] | None = None, engine: int = 0) -> None:
        """Fail these requests, or all, and tell everyone who listens; the engine did not get to do it."""
        done = self._deliver_death(error, engine_ids)
        for summary in done.summaries:
            self._events.on_request_finished(summary)
        nothing = StepOutput(step_id=-1, now=self.clock.now(), request_ids=[], counts=[], token_ids=[], engine=engine)
        for observer in self._observers:
            self._tell(observer, observer.on_step, nothing, done)

    def _on_event(self, event: ExecutorEvent) -> None:
        if event.kind == "progress":
            self._progress.show(event)
        else:
            logger.warning("executor: %s: %s", event.kind, event.message)

    def _deliver_death(self, error: EngineDeadError, engine_ids: list[str] | None = None) -> Processed:
        done = self._outputs.fail(error, self.clock.now(), engine_ids)
        for sink, requests in done.news.items():
            sink.deliver(requests)
        return done

    def _abort_in_engine(self, ids: list[str]) -> None:
        if not ids:
            return
        try:
            self._client.abort(ids)
        except EngineDeadError:
            logger.debug("nothing to abort: the engine is gone")


def _choice(name: str, reason: str) -> str:
    return f"{name} ({reason})" if reason else name

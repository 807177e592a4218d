"""`AsyncLLM`: the same engine for an event loop; answers arrive as deltas."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from interlace.config import LoadedSettings
from interlace.engine.client import EngineHealth
from interlace.engine.front import Front
from interlace.engine.input_processor import PreparedRequest, Prompt, RequestOptions
from interlace.engine.llm import load_constructor
from interlace.engine.output_state import ActiveRequest
from interlace.engine.snapshot import MAX_BLOCKS, MAX_REQUESTS, EngineSnapshot
from interlace.errors import EngineDeadError, RequestFailedError
from interlace.messages import RequestOutput, SamplingParams


class AsyncLLM:
    """A model that streams.

        async with AsyncLLM("smollm2") as llm:
            async for output in llm.generate("The capital of France is"):
                print(output.outputs[0].text, end="")

    The constructor reads the settings; the engine starts with `start`, `create`, `async with` or the first request,
    in a thread, so that the event loop goes on.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        config: str | Path | None = None,
        plugins: Sequence[Any] | Mapping[str, Any] = (),
        **settings: Any,
    ) -> None:
        """Arguments as for `LLM`. Raises `ConfigError`; nothing is started."""
        self._prepare(*load_constructor(model, config, plugins, settings), "inline")

    @classmethod
    async def create(cls, *arguments: Any, **settings: Any) -> Self:
        """Construct and start. Raises what starting `LLM` raises."""
        return await cls(*arguments, **settings).start()

    @classmethod
    def from_loaded(
        cls,
        loaded: LoadedSettings,
        *,
        plugins: Sequence[Any] = (),
        default_process: str = "inline",
        supervised: bool = False,
    ) -> Self:
        """For settings that are already loaded. `default_process` is where the engine runs when the settings leave it
        open: `inline` or `subprocess`. `supervised`: an engine process that dies is started again (`Front.open`)."""
        llm = cls.__new__(cls)
        llm._prepare(loaded, plugins, default_process, supervised)
        return llm

    @classmethod
    def from_front(cls, front: Front) -> Self:
        """Over a front that is already started; `shutdown` shuts it down."""
        llm = cls.from_loaded(front.loaded)
        llm._attach(front)
        return llm

    def _prepare(
        self, loaded: LoadedSettings, plugins: Sequence[Any], default_process: str, supervised: bool = False
    ) -> None:
        self.loaded = loaded
        self._plugins = plugins
        self._default_process = default_process
        self._supervised = supervised
        self._front: Front | None = None
        self._closed = False
        self._starting = asyncio.Lock()
        self._sink: _LoopSink | None = None

    def _attach(self, front: Front) -> None:
        self._front = front
        self._finalizer = weakref.finalize(self, front.shutdown)

    @property
    def front(self) -> Front:
        """The started front. Raises `EngineDeadError` before `start` and after `shutdown`."""
        if self._front is None or self._closed:
            raise EngineDeadError("the engine was shut down" if self._closed else "the engine is not started")
        return self._front

    async def start(self) -> Self:
        """Start the engine unless it is running. Raises what starting `LLM` raises."""
        async with self._starting:
            if self._front is None and not self._closed:
                self._attach(await asyncio.to_thread(self._build))
        return self

    def _build(self) -> Front:
        return Front.open(
            self.loaded, default_process=self._default_process, supervised=self._supervised, plugins=self._plugins
        )

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        *,
        timeout: float | None = None,
        cache_salt: str | None = None,
        labels: dict[str, str] | None = None,
        chat_options: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Answer one prompt; yields deltas: the text and tokens since the last one, of the samples that have any.

        A slow consumer gets fewer, larger deltas. Leaving the loop or cancelling the task aborts the request in the
        engine and frees its blocks. Raises `InvalidRequestError` at the first step of the iteration,
        `RequestFailedError` when the request fails (with n > 1: any of its samples), and `EngineDeadError`."""
        if self._front is None:
            await self.start()
        options = RequestOptions(priority=priority, timeout=timeout, cache_salt=cache_salt, labels=labels or {})
        prepared = self.front.prepare(prompt, params, request_id=request_id, options=options, chat_options=chat_options)
        outputs = self.run([prepared])
        try:
            async for _, output in outputs:
                yield output
        finally:
            await outputs.aclose()

    async def run(
        self, prepared: Sequence[PreparedRequest], *, streaming: bool = True
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Answer prompts of `front.prepare`, which enter the engine together; yields (index of prompt, delta).

        Not `streaming`: one output per prompt, when it has ended, for the price of one wake-up. Leaving the loop aborts
        what is outstanding. Raises what `generate` raises; the failure of one prompt ends all."""
        front, sink = self.front, self._current_sink()
        requests = front.submit(prepared, sink, streaming=streaming)
        news = sink.register(requests)
        index = {request: i for i, request in enumerate(requests)}
        try:
            while index:
                for request in await news.wait():
                    output = front.take(request)
                    if output is None:
                        continue
                    _raise_failure(request)
                    yield index[request], output
                    if output.finished:
                        del index[request]
        finally:
            sink.forget(requests)
            front.abort(requests)

    async def abort(self, request_id: str) -> bool:
        """End a request; its iterator yields a last delta with `finish_reason` "abort". Whether there was one."""
        request = self.front.find(request_id)
        if request is None or request.finished:
            return False
        self.front.abort([request])
        request.sink.deliver([request])
        return True

    async def health(self, timeout: float = 5.0) -> EngineHealth:
        """Ask the engine loop; a dead engine is a status, too (see `Front.health`). Raises `EngineDeadError` only
        before `start` and after `shutdown`."""
        return await asyncio.to_thread(self.front.health, timeout)

    async def wait_dead(self) -> EngineDeadError:
        """Wait until the engine has died and is not started again; returns the reason. May be cancelled."""
        return await asyncio.wrap_future(self.front.death)

    async def snapshot(self, max_requests: int = MAX_REQUESTS, max_blocks: int = MAX_BLOCKS) -> EngineSnapshot:
        """The inside of the engine between two steps. Raises `EngineDeadError`; waits for the step under way."""
        return await asyncio.to_thread(self.front.snapshot, max_requests, max_blocks)

    async def control(self, operation: str, **arguments: Any) -> Any:
        """Run a named operation in the engine, between steps (`reset_prefix_cache`, …)."""
        return await asyncio.to_thread(self.front.control, operation, **arguments)

    async def shutdown(self) -> None:
        """Stop the engine; iterators under way raise `EngineDeadError`. May be called twice."""
        async with self._starting:
            self._closed = True
            if self._front is not None:
                await asyncio.to_thread(self._finalizer)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.shutdown()

    def _current_sink(self) -> _LoopSink:
        loop = asyncio.get_running_loop()
        if self._sink is None or self._sink.loop is not loop:
            self._sink = _LoopSink(loop)
        return self._sink


class _LoopSink:
    """Wakes the iterators of one event loop, with one call into the loop per step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._news: dict[ActiveRequest, _News] = {}

    def register(self, requests: Sequence[ActiveRequest]) -> _News:
        """In the loop, right after submission: what was delivered before waits in the loop's queue."""
        news = _News()
        self._news.update(dict.fromkeys(requests, news))
        return news

    def forget(self, requests: Sequence[ActiveRequest]) -> None:
        for request in requests:
            self._news.pop(request, None)

    def deliver(self, requests: list[ActiveRequest]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self._wake, requests)

    def _wake(self, requests: list[ActiveRequest]) -> None:
        for request in requests:
            if news := self._news.get(request):
                news.add(request)


class _News:
    """Which requests of one iterator have changed."""

    def __init__(self) -> None:
        self._changed: dict[ActiveRequest, None] = {}
        self._any = asyncio.Event()

    def add(self, request: ActiveRequest) -> None:
        self._changed[request] = None
        self._any.set()

    async def wait(self) -> list[ActiveRequest]:
        """Until there are any; each is said once."""
        await self._any.wait()
        self._any.clear()
        changed, self._changed = list(self._changed), {}
        return changed


def _raise_failure(request: ActiveRequest) -> None:
    for sample in request.samples:
        if sample.error is not None:
            raise RequestFailedError(sample.error, sample.error_code)

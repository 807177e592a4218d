"""Fakes for tests of what surrounds the engine: no model, no worker, no waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from interlace.clock import Clock, VirtualClock
from interlace.engine.client import EngineClient, EngineHealth, OnDeath, OnEvent, OnOutput
from interlace.errors import EngineDeadError
from interlace.interfaces.executor import ExecutorInfo
from interlace.kv.specs import KVCacheConfig
from interlace.messages import EngineRequest, FinishInfo, StepOutput, StepStats, TokenLogprobs

Answer = Callable[[EngineRequest], Sequence[int]]


class ScriptedClient(EngineClient):
    """An engine whose answers are known beforehand: `answer(request)` are the tokens of that request.

    A request ends where a token is one of its EOS or stop ids, at `max_tokens`, or with its script (reason `length`).
    With `auto` a thread makes steps while there is work, `pause` seconds apart; otherwise the test calls `step()`.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        auto: bool = True,
        tokens_per_step: int = 1,
        pause: float = 0.0,
        clock: Clock | None = None,
    ) -> None:
        self._answer = answer
        self._auto = auto
        self._tokens_per_step = tokens_per_step
        self._pause = pause
        self._clock = clock or VirtualClock()
        self._changed = threading.Condition()
        self._scripts: dict[str, tuple[EngineRequest, list[int]]] = {}
        self._done: dict[str, int] = {}
        self._finished: dict[str, FinishInfo] = {}
        self._on_output: OnOutput | None = None
        self._on_death: OnDeath | None = None
        self._dead: EngineDeadError | None = None
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._steps = 0
        self.added: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.operations: list[tuple[str, dict[str, Any]]] = []

    def start(self, on_output: OnOutput, on_death: OnDeath, on_event: OnEvent | None = None) -> ExecutorInfo:
        self._on_output, self._on_death = on_output, on_death
        if self._auto:
            self._thread = threading.Thread(target=self._loop, name="scripted-engine", daemon=True)
            self._thread.start()
        return ExecutorInfo(
            kv=KVCacheConfig(block_size=16, num_blocks=1024, groups=(), bytes_per_block=4096),
            timings={"import": 0.1, "weights": 0.2},
        )

    def add(self, requests: list[EngineRequest]) -> None:
        with self._changed:
            self._check_alive()
            for request in requests:
                self.added.append(request)
                self._scripts[request.id] = (request, list(self._answer(request)))
                self._done[request.id] = 0
            self._changed.notify_all()

    def abort(self, request_ids: list[str]) -> None:
        with self._changed:
            self._check_alive()
            for request_id in request_ids:
                if request_id in self._scripts:
                    self.aborted.append(request_id)
                    self._end(request_id, FinishInfo(reason="abort"))
            self._changed.notify_all()

    def health(self, timeout: float = 5.0) -> EngineHealth:
        self._check_alive()
        return EngineHealth(status="ok", num_running=len(self._scripts), steps=self._steps)

    def control(self, operation: str, **arguments: Any) -> Any:
        self._check_alive()
        self.operations.append((operation, arguments))
        return True

    def shutdown(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # ── What the test does ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def running(self) -> list[str]:
        """Ids of the requests under way."""
        return list(self._scripts)

    def fail(self, request_id: str, error: str, code: str = "error") -> None:
        """End one request with an error in the next step."""
        with self._changed:
            self._end(request_id, FinishInfo(reason="error", error=error, error_code=code))
            self._changed.notify_all()

    def die(self, cause: Exception) -> None:
        """Stop the engine as if `cause` had been raised in it."""
        error = EngineDeadError(f"the engine stopped: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        with self._changed:
            self._dead = error
            self._changed.notify_all()
        assert self._on_death is not None, "die() before start()"
        self._on_death(error)

    def step(self) -> StepOutput:
        """One step: the next tokens of every running request, handed to the front and returned."""
        with self._changed:
            output = self._make_step()
        assert self._on_output is not None, "step() before start()"
        self._on_output(output)
        return output

    # ── Inside ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(*self._dead.args) from self._dead.__cause__
        if self._stopped:
            raise EngineDeadError("the engine was shut down")

    def _end(self, request_id: str, info: FinishInfo) -> None:
        if self._scripts.pop(request_id, None) is not None:
            self._finished[request_id] = info

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._dead or self._scripts or self._finished)
                if self._pause:
                    self._changed.wait_for(lambda: self._stopped, self._pause)
                if self._stopped or self._dead:
                    return
            self.step()

    def _make_step(self) -> StepOutput:
        now = self._clock.now()
        ids: list[str] = []
        counts: list[int] = []
        tokens: list[int] = []
        logprobs: dict[str, list[TokenLogprobs]] = {}
        first = {name: now for name, done in self._done.items() if not done and name in self._scripts}
        for name, (request, script) in list(self._scripts.items()):
            start = self._done[name]
            new, info = _advance(request, script[start : start + self._tokens_per_step], start)
            self._done[name] += len(new)
            ids.append(name)
            counts.append(len(new))
            tokens += new
            if request.params.logprobs is not None:
                logprobs[name] = [TokenLogprobs([token], [-0.5], 1) for token in new]
            if info is None and self._done[name] >= len(script):
                info = FinishInfo(reason="length")
            if info is not None:
                self._end(name, info)
        finished, self._finished = self._finished, {}
        self._steps += 1
        return StepOutput(
            step_id=self._steps,
            now=now,
            request_ids=ids,
            counts=counts,
            token_ids=tokens,
            finished=finished,
            first_scheduled=first,
            cached_tokens=dict.fromkeys(first, 0),
            logprobs=logprobs,
            stats=self._stats(now, len(ids), len(tokens)),
        )

    def _stats(self, now: float, num_requests: int, num_tokens: int) -> StepStats:
        return StepStats(
            step_id=self._steps,
            now=now,
            duration=0.0,
            num_running=len(self._scripts),
            num_waiting=0,
            num_scheduled_requests=num_requests,
            num_scheduled_tokens=num_tokens,
            num_prefill_tokens=0,
            num_sampled_tokens=num_tokens,
            num_preemptions=0,
            kv_usage=0.0,
            prefix_queries=0,
            prefix_hits=0,
        )


def _advance(request: EngineRequest, tokens: list[int], done: int) -> tuple[list[int], FinishInfo | None]:
    """The tokens up to the one that ends the request, if any does."""
    params = request.params
    stops = set(params.stop_token_ids or ())
    eos = set() if params.ignore_eos else set(request.eos_token_ids)
    for i, token in enumerate(tokens):
        if token in stops:
            return tokens[: i + 1], FinishInfo(reason="stop", stop_reason=token)
        if token in eos:
            return tokens[: i + 1], FinishInfo(reason="stop")
        if params.max_tokens is not None and done + i + 1 >= params.max_tokens:
            return tokens[: i + 1], FinishInfo(reason="length")
    return tokens, None

"""`EngineHarness`: an engine core over a scripted executor and a virtual clock, one step at a time.

    harness = EngineHarness(MyScheduler(MyScheduler.Options()), num_blocks=32)
    first = harness.add([1, 2, 3], max_tokens=5)
    second = harness.add([1, 2, 3, 4], max_tokens=5, priority=-1)
    harness.run()
    assert harness.records[second].first_step <= harness.records[first].first_step

Milliseconds, no torch, no model. Every plan is checked against the budgets and by a worker that trusts nothing, the
engine's books are checked after every plan and update, and `run` ends by comparing every output with what the request
would have produced alone. So a test that uses the harness tests all of that on the way.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from interlace.clock import VirtualClock
from interlace.engine.core import EngineCore
from interlace.interfaces.scheduler import RequestView, Scheduler, StepBuilder
from interlace.messages import EngineRequest, FinishInfo, SamplingParams, StepOutput, StepPlan, StepResult
from interlace.request import RequestState
from interlace.spec import SchedulerLimits
from interlace.testing.checked_worker import generate_alone
from interlace.testing.executor import ScriptedExecutor, scripted_spec

ERROR_CODES = ("deadline", "empty_prompt", "kv_capacity", "prompt_too_long", "rejected", "step_failed")
STEP_SECONDS = 0.01
"""How far the clock moves with each step."""


class ScriptedScheduler(Scheduler):
    """A scheduler whose `plan` is a function; `log` keeps what it returned, per step."""

    def __init__(
        self, plan: Callable[[StepBuilder], Any], order_key: Callable[[RequestView], Any] | None = None
    ) -> None:
        super().__init__(self.Options())
        self.log: list[Any] = []
        self._plan = plan
        self._order_key = order_key

    def plan(self, step: StepBuilder) -> None:
        self.log.append(self._plan(step))

    def order_key(self, request: RequestView) -> Any:
        return super().order_key(request) if self._order_key is None else self._order_key(request)


@dataclass
class Record:
    """One request as seen from outside."""

    request: EngineRequest
    tokens: list[int] = field(default_factory=list)
    finish: FinishInfo | None = None
    cached_tokens: int | None = None
    first_scheduled: float | None = None
    first_step: int | None = None
    """Id of the step whose output first said that it was scheduled."""
    last_step: int | None = None
    """Id of the step that gave its last token."""
    step_failed: bool = False
    """Whether it was part of a failed step, or its row failed."""

    @property
    def reason(self) -> str | None:
        """Finish reason; None while it runs."""
        return self.finish.reason if self.finish else None

    @property
    def error_code(self) -> str | None:
        """Error code of its end, if it ended with an error."""
        return self.finish.error_code if self.finish else None


@dataclass(frozen=True)
class InFlight:
    """A submitted step."""

    plan: StepPlan
    request_ids: list[str]
    """Per row."""
    future: Future[StepResult]


class EngineHarness:
    """Drives one engine core. `plan` and `complete` are the two halves of a step; `step` and `run` combine them."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        limits: SchedulerLimits | None = None,
        executor: ScriptedExecutor | None = None,
        prefix_caching: bool = True,
        max_model_len: int = 256,
        **options: Any,
    ) -> None:
        """`options` are those of `ScriptedExecutor`; or give an executor made with `manual=True`."""
        self.limits = limits or SchedulerLimits()
        self.max_model_len = max_model_len
        self.clock = VirtualClock()
        self.executor = executor or ScriptedExecutor(ScriptedExecutor.Options(manual=True, **options))
        self.executor.content_root = lambda admission: self._roots[id(admission)]
        name = type(scheduler).__name__.lower()
        spec = scripted_spec(f"nowhere:{name}", limits=self.limits, max_model_len=max_model_len)
        self.info = self.executor.start(spec, lambda event: None)
        self.core = EngineCore(
            scheduler, name, self.limits, self.info, max_model_len=max_model_len, prefix_caching=prefix_caching
        )
        self.records: dict[str, Record] = {}
        self.plans: list[StepPlan] = []
        self.in_flight: deque[InFlight] = deque()
        self._serial = 0
        self._roots: dict[int, int] = {}  # by identity of the admission; `plans` keeps them alive

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, prompt: Sequence[int], *, id: str | None = None, params: Any = None, **fields: Any) -> str:
        """Add a request and return its id. `fields` are fields of `EngineRequest`, else of `SamplingParams`."""
        self._serial += 1
        own = {key: fields.pop(key) for key in list(fields) if key in EngineRequest.__struct_fields__}
        values: dict[str, Any] = {"arrival_time": self.clock.now(), "seed": 0} | own
        request = EngineRequest(
            id=id or f"r{self._serial}",
            prompt_token_ids=list(prompt),
            params=params or SamplingParams(**fields),
            **values,
        )
        self.add_request(request)
        return request.id

    def add_request(self, request: EngineRequest) -> None:
        """Add a request as it is."""
        self.core.add(request, self.clock.now())
        self.records[request.id] = Record(request)
        self._after()

    def abort(self, *request_ids: str) -> None:
        """Abort requests, as a client may at any time."""
        self.core.abort(list(request_ids), self.clock.now())
        self._after()

    def state(self, request_id: str) -> RequestState:
        """The engine's own record of an unfinished request, to look at."""
        return self.core.queues.requests[request_id]

    def tokens(self, request_id: str) -> list[int]:
        """Output tokens of a request so far."""
        return self.records[request_id].tokens

    def expected(self, request_id: str) -> tuple[list[int], str]:
        """Output tokens and finish reason of a request if nothing disturbs it."""
        return generate_alone(self.records[request_id].request, self.executor.next_token, self.max_model_len)

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self) -> StepPlan | None:
        """Compose one step and submit it. None: nothing can run now."""
        plan = self.core.plan(self.clock.now())
        if plan is not None:
            self.plans.append(plan)
            states = {state.slot: state for state in self.core.queues.running}
            self._check_budgets(plan)
            rows = [states[slot].id for slot in plan.slots]
            for admission in plan.admitted:
                self._roots[id(admission)] = _content_root(states[admission.slot].request)
            self.in_flight.append(InFlight(plan, rows, self.executor.submit(plan)))
        self._after()
        return plan

    def complete(self) -> StepOutput:
        """Run the oldest step under way and take in its result, or its failure."""
        step = self.in_flight.popleft()
        self.executor.run_next()
        error = step.future.exception()
        if isinstance(error, AssertionError):
            raise error
        now = self.clock.advance(STEP_SECONDS)
        if error is None:
            result = step.future.result()
            for row in result.errors:
                self.records[step.request_ids[row]].step_failed = True
            output = self.core.update(result, now)
        else:
            for failed in (step, *self.in_flight):
                for request_id in failed.request_ids:
                    self.records[request_id].step_failed = True
            self.in_flight.clear()
            output = self.core.fail(str(error), now)
        self._absorb(output)
        self._after()
        return output

    def step(self) -> StepOutput | None:
        """Plan as many steps as may be under way, then complete the oldest. None: there was nothing to run."""
        while len(self.in_flight) < self.info.max_in_flight and self.plan() is not None:
            pass
        return self.complete() if self.in_flight else None

    def run(self, max_steps: int = 10_000) -> dict[str, list[int]]:
        """Run until nothing is left, then check every outcome (`check_end`); returns the output tokens by request.

        Raises `AssertionError` if requests are left after `max_steps`."""
        for _ in range(max_steps):
            if not self.core.has_work:
                break
            if self.step() is None:
                wakeup = self.core.next_wakeup()
                self.clock.advance(max(STEP_SECONDS, (wakeup or 0.0) - self.clock.now()))
        self.check_end()
        return {request_id: record.tokens for request_id, record in self.records.items()}

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks that admission sets aside for a request of `num_tokens` tokens without prefix hits."""
        size = self.info.kv.block_size
        most = [(group.window + self.limits.max_num_batched_tokens) // size + 2 for group in self.info.kv.groups]
        return sum(
            min(-(-num_tokens // size), limit) if group.window else -(-num_tokens // size)
            for group, limit in zip(self.info.kv.groups, most, strict=True)
        )

    # ── checks ────────────────────────────────────────────────────────────────────────────────────────────────

    def check_end(self) -> None:
        """Everything is over: each request ended once, for a true reason, with the tokens it has alone; and nothing is
        held any more. Raises `AssertionError`."""
        core = self.core
        left = list(core.queues.requests.values())
        assert not left, f"requests never finished: {left}"
        for record in self.records.values():
            self._check_outcome(record)
        core.check_integrity()
        pool = core.kv.pool
        assert pool.num_free == pool.num_usable, f"{pool.num_usable - pool.num_free} blocks are still held"
        assert core.queues.seats_left == self.limits.max_num_seqs, "a seat is still taken"
        assert self.executor.worker is not None
        untold = self.executor.worker.occupied - {*core.queues.released, *core.queues.preempted}
        assert not untold, f"the worker was not told that slots {sorted(untold)} are free"

    def _check_outcome(self, record: Record) -> None:
        request_id = record.request.id
        assert record.finish is not None, f"'{request_id}' is gone without an end"
        tokens, reason = self.expected(request_id)
        if record.reason in ("stop", "length"):
            assert (record.tokens, record.reason) == (tokens, reason), (
                f"'{request_id}' has {record.tokens} ({record.reason}), alone it has {tokens} ({reason})"
            )
            return
        assert record.tokens == tokens[: len(record.tokens)], (
            f"'{request_id}' began with {record.tokens}, alone it has {tokens}"
        )
        if record.error_code == "step_failed":
            assert record.step_failed, f"'{request_id}' failed with a step it had no part in"
        if record.error_code == "kv_capacity":
            needed = self.blocks_needed(len(record.request.prompt_token_ids) + len(record.tokens))
            assert needed > self.core.kv.pool.num_usable, f"'{request_id}' would have fit"
        assert record.reason == "abort" or record.error_code in ERROR_CODES, (
            f"'{request_id}' ended with {record.finish}"
        )

    def _check_budgets(self, plan: StepPlan) -> None:
        limits = self.limits
        assert len(set(plan.slots)) == len(plan.slots), f"a request is scheduled twice: {plan.slots}"
        assert sum(plan.num_tokens) <= limits.max_num_batched_tokens, f"{plan.num_tokens} exceed the token budget"
        assert len(plan.slots) <= limits.max_num_seqs, f"{len(plan.slots)} rows for {limits.max_num_seqs} seats"
        assert min(plan.num_tokens) >= 1, f"a row without tokens: {plan.num_tokens}"
        if limits.long_prefill_token_threshold:
            assert max(plan.num_tokens) <= limits.long_prefill_token_threshold, (
                f"a chunk is too long: {plan.num_tokens}"
            )
        assert len(self.in_flight) < self.info.max_in_flight, "more steps under way than the executor takes"

    def _after(self) -> None:
        """Whatever happened, the books must agree, and news without a step must reach the front."""
        self.core.check_integrity()
        output = self.core.pending_output(self.clock.now())
        if output is not None:
            self._absorb(output)

    def _absorb(self, output: StepOutput) -> None:
        assert sum(output.counts) == len(output.token_ids), "the counts of an output do not add up"
        start = 0
        for request_id, first in output.first_scheduled.items():
            record = self.records[request_id]
            assert record.first_scheduled is None, f"'{request_id}' is scheduled for the first time, again"
            record.first_scheduled, record.first_step = first, output.step_id
        for request_id, cached in output.cached_tokens.items():
            assert self.records[request_id].cached_tokens is None, f"hits of '{request_id}' are counted twice"
            self.records[request_id].cached_tokens = cached
        for request_id, count in zip(output.request_ids, output.counts, strict=True):
            record = self.records[request_id]
            assert record.finish is None, f"'{request_id}' has tokens after its end"
            record.tokens += output.token_ids[start : start + count]
            record.last_step = output.step_id
            start += count
        for request_id, info in output.finished.items():
            assert self.records[request_id].finish is None, f"'{request_id}' ended twice"
            self.records[request_id].finish = info


def _content_root(request: EngineRequest) -> int:
    """Requests of different salt or adapter must never share blocks, so what they write differs."""
    return zlib.crc32(repr((request.cache_salt, request.adapter)).encode())

"""`EngineCore`: plan → run → update, as a passive state machine. It never waits, and decides by the time it is told.

A driver owns waiting: it calls `plan`, hands the plan to the executor, and calls `update` (or `fail`) with what came
back, oldest step first. Up to `max_in_flight` plans may be under way.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

from interlace.engine.in_flight import InFlightStep, StepProgress
from interlace.engine.output_buffer import OutputBuffer
from interlace.engine.watchdog import StarvationWatchdog
from interlace.errors import InterlaceError, InvalidRequestError
from interlace.interfaces.executor import ExecutorInfo
from interlace.interfaces.scheduler import Scheduler
from interlace.kv.block_pool import Key
from interlace.kv.manager import KVManager
from interlace.messages import (
    Admission,
    BlockDelta,
    EngineRequest,
    FinishInfo,
    StepOutput,
    StepPlan,
    StepResult,
    StepStats,
    TokenLogprobs,
)
from interlace.request import RequestState, Status
from interlace.scheduling.fallback import GuardedPolicy
from interlace.scheduling.queues import Queues
from interlace.scheduling.step_builder import StepBuilder
from interlace.spec import SchedulerLimits


class EngineCore:
    """The state of one engine: queues, KV blocks, and the steps under way. Used from one thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        scheduler_name: str,
        limits: SchedulerLimits,
        info: ExecutorInfo,
        *,
        max_model_len: int,
        prefix_caching: bool = True,
        timer: Callable[[], float] = float,
    ) -> None:
        """`timer` gives seconds for the account of what the policy costs, and for nothing else; by default always 0."""
        self._policy = GuardedPolicy(scheduler, scheduler_name, timer)
        self.kv = KVManager(info.kv, prefix_caching, limits.max_num_batched_tokens)
        self.queues = Queues(limits.max_num_seqs, self._policy.order_key)
        self.max_in_flight = info.max_in_flight
        self._info = info
        self.limits = limits
        self.max_model_len = max_model_len
        self._watchdog = StarvationWatchdog(scheduler_name, limits.starvation_timeout_s)
        self._steps: deque[InFlightStep] = deque()
        self._next_step_id = 0
        self._ended: list[RequestState] = []  # the policy has not heard of it yet
        self._deadlines: list[tuple[float, str]] = []
        self._wake_time: float | None = None
        self._out = OutputBuffer()
        self.prefix_queries = 0
        self.prefix_hits = 0

    # ── requests in and out ───────────────────────────────────────────────────────────────────────────────────

    def add(self, request: EngineRequest, now: float) -> None:
        """Take in a request. One that can never run ends at once, in the next output.

        Raises `InvalidRequestError` for an id that is in use."""
        if request.id in self.queues.requests:
            raise InvalidRequestError(f"a request with id '{request.id}' is already running; ids must be unique")
        state = RequestState(request, self.max_model_len, len(self.kv.config.groups))
        self._policy.on_arrival(state, now)
        self.queues.add(state)
        if state.deadline is not None:
            heapq.heappush(self._deadlines, (state.deadline, state.id))
        if state.max_tokens < 1:
            text = f"the prompt has {state.num_prompt_tokens} tokens, max_model_len is {self.max_model_len}"
            self._end_with_error(state, text, "prompt_too_long")
        elif not state.num_prompt_tokens:
            self._end_with_error(state, "the prompt is empty: it needs at least one token", "empty_prompt")
        self._tell_ended(now)

    def abort(self, request_ids: list[str], now: float) -> None:
        """End requests; unknown and finished ids are ignored. Their blocks are free when this returns."""
        for request_id in request_ids:
            state = self.queues.requests.get(request_id)
            if state is not None:
                self._finish(state, FinishInfo(reason="abort", num_preemptions=state.num_preemptions))
        self._tell_ended(now)

    def unblock(self, request_id: str, name: str) -> None:
        """Lift one name a request is blocked on (see `EngineRequest.blocked_on`)."""
        state = self.queues.requests.get(request_id)
        if state is not None:
            self.queues.unblock(state, name)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished or any step is under way."""
        return bool(self.queues.requests or self._steps)

    @property
    def has_runnable(self) -> bool:
        """Whether a plan may find something to run."""
        return bool(self.queues.running or len(self.queues.waiting))

    @property
    def num_in_flight(self) -> int:
        return len(self._steps)

    @property
    def plans_in_flight(self) -> list[StepPlan]:
        """The plans under way, oldest first."""
        return [step.plan for step in self._steps]

    @property
    def degraded(self) -> str | None:
        """Why health is degraded, or None."""
        return self._policy.degraded or self._watchdog.degraded

    # ── plan ──────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, now: float) -> StepPlan | None:
        """Compose the next step. None when nothing can run now, or `max_in_flight` steps are under way."""
        self._expire(now)
        self._wake_time = None
        if len(self._steps) >= self.max_in_flight or not (self.queues.running or len(self.queues.waiting)):
            return None
        step = StepBuilder(self.queues, self.kv, self.limits, now, self._info, len(self._steps), self._end_with_error)
        self._policy.plan(step, bool(self._steps), len(self.queues.requests))
        step.close()
        self._wake_time = step.wake_time
        self.prefix_queries += step.prefix_queries
        self.prefix_hits += step.prefix_hits
        plan = self._seal(step, now) if step.rows else None
        self._watchdog.check(now, self.queues)
        self._tell_ended(now)
        return plan

    def _seal(self, step: StepBuilder, now: float) -> StepPlan:
        """Turn a composed step into a plan, publish the blocks it fills, and remember it as under way."""
        requests = list(step.rows)
        slots, sample = [], []
        published: list[tuple[int, Key]] = []
        block_size = self.kv.block_size
        for state, count in step.rows.items():
            planned, in_flight = state.num_planned, state.samples_in_flight
            slots.append(state.slot)
            sample.append(planned == state.num_known + in_flight)
            if sample[-1]:
                state.samples_in_flight = in_flight + 1
            state.last_planned = now
            if count > 1 or not planned % block_size:
                published += self.kv.publish(state)
        for state, hit_tokens in step.admitted.items():
            if state.first_scheduled is None:
                state.first_scheduled = now
                self._out.first_scheduled[state.id] = now
                self._out.cached_tokens[state.id] = hit_tokens
        plan = StepPlan(
            step_id=self._next_step_id,
            slots=slots,
            num_tokens=list(step.rows.values()),
            sample=sample,
            blocks=self._block_deltas(step),
            admitted=[_admission(state, hit) for state, hit in step.admitted.items()],
            finished=self.queues.released,
            preempted=self.queues.preempted,
        )
        self.queues.released, self.queues.preempted = [], []
        self._next_step_id += 1
        self._steps.append(InFlightStep(plan, requests, published))
        return plan

    def _block_deltas(self, step: StepBuilder) -> list[BlockDelta]:
        """New block table entries per KV group; whole tables for requests admitted in this step."""
        deltas = []
        for group in range(len(self.kv.config.groups)):
            slots, counts, block_ids = [], [], []
            for state, new in step.grown.items():
                ids = state.blocks[group] if state in step.admitted else new[group]
                if ids:
                    slots.append(state.slot)
                    counts.append(len(ids))
                    block_ids += ids
            deltas.append(BlockDelta(slots, counts, block_ids))
        return deltas

    # ── update ────────────────────────────────────────────────────────────────────────────────────────────────

    def update(self, result: StepResult, now: float) -> StepOutput:
        """Take in the result of the oldest step under way; returns what is new for the front."""
        step = self._steps.popleft()
        if step.plan.step_id != result.step_id:
            raise InterlaceError(f"result of step {result.step_id} arrived, step {step.plan.step_id} was expected")
        confirmed, num_new_tokens = self._confirm(step, result)
        if self._policy.wants_updates:
            self._policy.on_update(StepProgress(result.duration, confirmed, num_new_tokens), now)
        self._tell_ended(now)
        return self._out.take(result.step_id, now, self._stats(step, result, now))

    def _confirm(self, step: InFlightStep, result: StepResult) -> tuple[list[RequestState], list[int]]:
        """Take in every row's tokens; returns the requests that still run the row's generation, and their counts."""
        confirmed, num_new_tokens, token_ids, news = [], [], result.token_ids, self._out.add_token
        # All that is done for every token of every decoding request: nothing here but what such a row needs.
        plain = not (result.errors or result.prompt_logprobs or result.logprobs)
        filled = self.kv.block_size if self._steps else self.max_model_len + 1  # `_append` publishes what is full late
        offset = 0
        rows = zip(step.requests, step.generations, step.plan.num_tokens, step.plan.sample, result.counts, strict=True)
        for row, (state, generation, num_tokens, samples, count) in enumerate(rows):
            start, offset = offset, offset + count
            if state.generation != generation:
                continue  # finished, aborted or preempted meanwhile
            confirmed.append(state)
            num_new_tokens.append(count)
            if plain and samples and count == 1 and (state.num_known + 1) % filled:
                token = token_ids[start]
                state.num_in_flight -= num_tokens
                state.samples_in_flight -= 1
                state.num_known = known = state.num_known + 1
                state.token_ids.append(token)
                news(state.id, token)
                if token in state.stop_set or known >= state.max_known:
                    self._end_if_stopped(state, token)
            else:
                self._confirm_row(step, row, state, token_ids[start:offset], result)
        if any(num_new_tokens):
            self._policy.fruitless = 0
        return confirmed, num_new_tokens

    def _confirm_row(
        self, step: InFlightStep, row: int, state: RequestState, tokens: list[int], result: StepResult
    ) -> None:
        """One row, whatever it may have: no tokens, several, errors, log probabilities."""
        plan = step.plan
        start = state.num_planned - state.num_in_flight  # of the row: the oldest step's tokens come first
        state.num_in_flight -= plan.num_tokens[row]
        if row in result.errors:
            self._end_with_error(state, result.errors[row], "step_failed")
            return
        if plan.sample[row] and not tokens:
            self._end_with_error(state, "the executor returned no token for this request", "step_failed")
            return
        if row in result.prompt_logprobs:
            entries = result.prompt_logprobs[row][max(0, state.num_prompt_logprobs - start) :]
            self._out.prompt_logprobs.setdefault(state.id, []).extend(entries)
            state.num_prompt_logprobs += len(entries)
        if plan.sample[row]:
            state.samples_in_flight -= 1
            self._append(state, tokens, result.logprobs.get(row))

    def _append(self, state: RequestState, tokens: list[int], logprobs: list[TokenLogprobs] | None) -> None:
        """Confirm sampled tokens of one request and end it where it stops."""
        for position, token in enumerate(tokens):
            state.token_ids.append(token)
            state.num_known += 1
            if self._stop_check(state, token) is not None:
                tokens = tokens[: position + 1]
                break
        self._out.add_tokens(state.id, tokens, logprobs)
        stopped = self._end_if_stopped(state, tokens[-1])
        if not stopped and self._steps and state.num_known // self.kv.block_size > state.num_published:
            # A block planned before its last token was known: publish it now, on the account of the newest step.
            self._steps[-1].published += self.kv.publish(state)

    def _end_if_stopped(self, state: RequestState, token: int) -> bool:
        if (finish := self._stop_check(state, token)) is not None:
            self._finish(state, finish)
        return finish is not None

    def _stop_check(self, state: RequestState, token: int) -> FinishInfo | None:
        """End of sequence, then stop tokens, then length; the former two not before `min_tokens`."""
        num_output = state.num_known - state.num_prompt_tokens
        if token in state.stop_set and num_output >= state.params.min_tokens:
            stop_reason = None if token in state.eos_token_ids else token
            return FinishInfo(reason="stop", stop_reason=stop_reason, num_preemptions=state.num_preemptions)
        if state.num_known >= state.max_known:
            return FinishInfo(reason="length", num_preemptions=state.num_preemptions)
        return None

    def fail(self, message: str, now: float) -> StepOutput:
        """The oldest step failed, and with it every step under way: their requests end with an error, the blocks
        they published are withdrawn, all other requests go on."""
        step_id = self._steps[0].plan.step_id
        for step in self._steps:
            self.kv.withdraw(step.published)
        for step in list(self._steps):
            for state, generation in zip(step.requests, step.generations, strict=True):
                if state.generation == generation:
                    self._end_with_error(state, message, "step_failed")
        self._steps.clear()
        self._tell_ended(now)
        return self._out.take(step_id, now, None)

    # ── endings ───────────────────────────────────────────────────────────────────────────────────────────────

    def _finish(self, state: RequestState, info: FinishInfo) -> None:
        """Take a request out. Whoever calls this sees to it that `_tell_ended` follows, outside the policy's calls."""
        self.kv.free(state)
        self.queues.finish(state)
        self._out.finished[state.id] = info
        self._ended.append(state)

    def _end_with_error(self, state: RequestState, message: str, code: str) -> None:
        info = FinishInfo(reason="error", error=message, error_code=code, num_preemptions=state.num_preemptions)
        self._finish(state, info)

    def _tell_ended(self, now: float) -> None:
        if self._ended:
            ended, self._ended = self._ended, []
            self._policy.on_finish(ended, now)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            state = self.queues.requests.get(request_id)
            if state is not None and state.deadline is not None and state.deadline <= now:
                waited = now - state.arrival_time
                self._end_with_error(state, f"the request's deadline passed after {waited:.3f} s", "deadline")
        self._tell_ended(now)

    # ── facts ─────────────────────────────────────────────────────────────────────────────────────────────────

    def next_wakeup(self) -> float | None:
        """When `plan` should be called again even if nothing happens until then."""
        times = (self._wake_time, self._deadlines[0][0] if self._deadlines else None)
        return min((time for time in times if time is not None), default=None)

    def pending_output(self, now: float) -> StepOutput | None:
        """What became known outside a step (aborts, rejections, deadlines), or None."""
        return self._out.take(-1, now, None) if self._out else None

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running requests keep their blocks."""
        self.kv.pool.forget_all()

    def check_integrity(self) -> None:
        """Raise `AssertionError` if any request or block is lost, leaked or in two places."""
        queues = self.queues
        waiting = queues.waiting.snapshot()
        places = [*waiting, *queues.blocked.values(), *queues.running]
        if len(set(places)) != len(places) or {r.id for r in places} != set(queues.requests):
            raise AssertionError("a request is lost, or in two queues at once")
        for state in places:
            running = state.status is Status.RUNNING
            if running != (state in queues.running) or running != (state.slot >= 0):
                raise AssertionError(f"{state!r} does not agree with its queue or slot")
            if not 0 <= state.num_in_flight <= state.num_planned <= state.num_known + state.samples_in_flight:
                raise AssertionError(f"{state!r} has token counts that contradict each other")
        slots = [state.slot for state in queues.running]
        if len(set(slots)) != len(slots) or len(slots) + queues.seats_left != self.limits.max_num_seqs:
            raise AssertionError("a slot is lost or given twice")
        self.kv.check_integrity(places)

    def _stats(self, step: InFlightStep, result: StepResult, now: float) -> StepStats:
        plugin_seconds = {self._policy.account: self._policy.take_seconds()}
        if result.plugin_seconds:
            plugin_seconds.update(result.plugin_seconds)
        return StepStats(
            step_id=result.step_id,
            now=now,
            duration=result.duration,
            num_running=len(self.queues.running),
            num_waiting=len(self.queues.waiting) + len(self.queues.blocked),
            num_scheduled_requests=len(step.requests),
            num_scheduled_tokens=step.num_tokens,
            num_prefill_tokens=step.num_prefill_tokens,
            num_sampled_tokens=len(result.token_ids),
            num_preemptions=step.num_preempted,
            kv_usage=self.kv.usage,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            num_blocked=len(self.queues.blocked),
            num_failed_requests=len(result.errors),
            kv_block_times=self.kv.pool.lives.news(),
            degraded=self.degraded,
            plugin_seconds=plugin_seconds,
        )


def _admission(state: RequestState, hit_tokens: int) -> Admission:
    return Admission(
        slot=state.slot,
        generation=state.generation,
        token_ids=list(state.token_ids),
        num_prompt_tokens=state.num_prompt_tokens,
        num_cached_tokens=hit_tokens,
        params=state.params,
        seed=state.request.seed,
        sample_index=state.request.sample_index,
        stop_token_ids=tuple(state.stop_set),
    )

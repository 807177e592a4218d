"""`StepBuilder`: the mechanism under every scheduling policy.

A policy composes one step from these primitives. Whatever it does, the builder keeps the budgets, gives every token a
block before it is planned, and leaves nothing half done: each primitive either takes full effect or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from interlace.interfaces.executor import ExecutorInfo
from interlace.interfaces.scheduler import Outcome, RequestView
from interlace.kv.manager import KVManager, PrefixHit
from interlace.request import RequestState, Status
from interlace.scheduling.queues import Queues
from interlace.spec import SchedulerLimits

CALLS_PER_REQUEST = 16
"""A policy may use the builder this many times per unfinished request in one step (and for 16 requests more)."""


class PolicyRunawayError(Exception):
    """The policy made more calls than any sensible plan needs; the fallback completes the step."""


class StaleBuilderError(Exception):
    """A builder was used after the step it was made for."""


class StepBuilder:
    """One step under construction. See `interlace.interfaces.scheduler.StepBuilder` for the contract."""

    def __init__(
        self,
        queues: Queues,
        kv: KVManager,
        limits: SchedulerLimits,
        now: float,
        info: ExecutorInfo,
        num_steps: int,
        end_request: Callable[[RequestState, str, str], None],
    ) -> None:
        self.now = kv.pool.lives.now = now
        self.token_budget_left = limits.max_num_batched_tokens
        self.rows: dict[RequestState, int] = {}  # tokens planned per request, in order of planning
        self.grown: dict[RequestState, list[list[int]]] = {}  # new block ids per group of requests in `rows`
        self.admitted: dict[RequestState, int] = {}  # hit tokens of requests admitted in this step
        self.preempted: dict[RequestState, None] = {}  # in order of preemption
        self.wake_time: float | None = None
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._queues = queues
        self._kv = kv
        self._limits = limits
        self._feeds_tokens = info.feeds_tokens
        self._decodes_left = self._fair_part(info, num_steps)
        self._end_request = end_request
        self._calls_left = CALLS_PER_REQUEST * (len(queues.requests) + 16)
        self._closed = False
        self._pending: set[bytes] = set()  # prefix blocks being computed in this step
        self._blocks_were_short = False
        self._admission_closed = False
        self._reserved: int | None = None  # blocks running prefills still need; None: not counted yet

    # ── what a policy may look at ─────────────────────────────────────────────────────────────────────────────

    @property
    def sequences_left(self) -> int:
        return self._queues.seats_left

    @property
    def waiting(self) -> Sequence[RequestState]:
        self._count_call()
        waiting = self._queues.waiting.snapshot()
        return [request for request in waiting if request not in self.preempted] if self.preempted else waiting

    @property
    def running(self) -> Sequence[RequestState]:
        self._count_call()
        return list(self._queues.running)

    def cached_tokens(self, request: RequestView) -> int:
        state = self._own(request)
        if state is None:
            return 0
        return self._kv.find_prefix(state).num_tokens if state.status is Status.WAITING else state.num_planned

    def fits(self, request: RequestView) -> bool:
        state = self._own(request)
        if state is None or state in self.rows or state in self.preempted or state.blocked_on:
            return False
        if self.token_budget_left < 1:
            return False
        if state.status is Status.RUNNING:
            self._kv.trim(state)
            todo = self._todo(state)
            end = state.num_planned + self._chunk(todo, None)
            return self._may_continue(todo) and self._kv.num_missing(state, end) <= self._kv.pool.num_free
        if self._admission_closed or not self._queues.seats_left:
            return False
        hit = self._kv.find_prefix(state)
        return hit.missing not in self._pending and self._has_room(
            state, hit, self._chunk(state.num_known - hit.num_tokens, None)
        )

    # ── what a policy may do ──────────────────────────────────────────────────────────────────────────────────

    def wake_at(self, time: float) -> None:
        self._count_call()
        if not math.isfinite(time):
            raise ValueError(f"wake_at({time}): the time must be a finite number of clock seconds")
        self.wake_time = time if self.wake_time is None else min(self.wake_time, time)

    def continue_running(self, order: Callable[[RequestView], Any] | None = None) -> Sequence[RequestState]:
        self._count_call()
        running = list(self._queues.running) if order is None else sorted(self._queues.running, key=order)
        short: list[RequestState] = []
        prefills: list[RequestState] = []
        block_size, rows = self._kv.block_size, self.rows
        decodes_left = self._decodes_left
        kept = max(0, self.token_budget_left - decodes_left)  # tokens that decoding requests must leave
        most = budget = self.token_budget_left - kept
        for state in running:  # the loop every decoding request passes in every step
            if state in rows:
                continue
            planned = state.num_planned
            todo = self._todo(state) if state.samples_in_flight else state.num_known - planned
            if todo > 1:
                prefills.append(state)
            elif todo == 1:
                if budget < 1:
                    if kept:
                        continue  # there is still room for prefills
                    break
                if planned % block_size:  # the token's block is already there
                    rows[state] = 1
                    state.num_planned = planned + 1
                    state.num_in_flight += 1
                    budget -= 1
                    continue
                self.token_budget_left = budget
                if self._continue(state, 1) is Outcome.BLOCKS:
                    short.append(state)
                budget = self.token_budget_left
        self.token_budget_left = budget + kept
        self._decodes_left = decodes_left - (most - budget)
        for state in prefills:
            if self.token_budget_left < 1:
                break
            if self._continue(state, None) is Outcome.BLOCKS:
                short.append(state)
        return short

    def schedule(self, request: RequestView, max_tokens: int | None = None) -> Outcome:
        state = self._own(request)
        if state is None or state in self.rows:
            return Outcome.DONE
        if state in self.preempted or state.blocked_on:
            return Outcome.NOT_READY
        if self.token_budget_left < 1 or (max_tokens is not None and max_tokens < 1):
            return Outcome.BUDGET
        if state.status is Status.RUNNING:
            return self._continue(state, max_tokens)
        return self._admit(state, max_tokens)

    def preempt(self, request: RequestView) -> int:
        state = self._own(request)
        if state is None or state.status is not Status.RUNNING:
            return 0
        self._undo(state)
        freed = self._kv.free(state)
        if state in self.admitted:
            del self.admitted[state]
            self._queues.withdraw_admission(state)
        else:
            self._queues.suspend(state)
        self.preempted[state] = None
        self._admission_closed = self._admission_closed or self._blocks_were_short
        return freed

    def reject(self, request: RequestView, reason: str) -> None:
        state = self._own(request)
        if state is not None:
            self._end(state, f"rejected by the scheduling policy: {reason}", "rejected")

    def restore_calls(self) -> None:
        """A fresh allowance of calls, for the fallback."""
        self._calls_left = CALLS_PER_REQUEST * (len(self._queues.requests) + 16)

    def close(self) -> None:
        """The step is composed: whoever kept the builder gets an error from now on."""
        self._closed = True

    # ── mechanism ─────────────────────────────────────────────────────────────────────────────────────────────

    def _count_call(self) -> None:
        """Every use by the policy passes here."""
        if self._closed:
            raise StaleBuilderError("a StepBuilder is valid only during the `plan` call that it is given to")
        self._calls_left -= 1
        if self._calls_left < 0:
            raise PolicyRunawayError("the policy made too many calls in one step")

    def _own(self, request: RequestView) -> RequestState | None:
        """The engine's own record of `request`, or None if it is over. Counts the call."""
        self._count_call()
        state = self._queues.requests.get(request.id)
        return state if state is request else None

    def _todo(self, state: RequestState) -> int:
        """Tokens of a running request that could be computed now; 0 while it must wait for a sample."""
        in_flight = state.samples_in_flight
        if in_flight and (not self._feeds_tokens or state.num_output_tokens + in_flight >= state.max_tokens):
            return 0
        return state.num_known + state.samples_in_flight - state.num_planned

    def _may_continue(self, todo: int) -> bool:
        """Whether a running request with `todo` tokens to compute may be in this step."""
        return todo > 1 or (todo == 1 and self._decodes_left > 0)

    def _fair_part(self, info: ExecutorInfo, num_steps: int) -> int:
        """How many decoding requests this step may take while `num_steps` others are under way. With pipeline stages:
        an equal part of all, and no more than leaves as much for each step to come until every stage has one."""
        if info.feeds_tokens or info.num_stages == 1:
            return self._limits.max_num_batched_tokens
        decoding = [request for request in self._queues.running if not request.is_prefilling]
        ready = sum(not request.samples_in_flight for request in decoding)
        parts = -(-len(decoding) // info.num_stages), -(-ready // max(1, info.num_stages - num_steps))
        return max(1, min(parts))

    def _chunk(self, todo: int, max_tokens: int | None) -> int:
        """How many of `todo` tokens this step may compute."""
        chunk = min(todo, self.token_budget_left)
        if max_tokens is not None:
            chunk = min(chunk, math.floor(max_tokens))  # a policy may well compute it as a share
        threshold = self._limits.long_prefill_token_threshold
        return min(chunk, threshold) if threshold else chunk

    def _continue(self, state: RequestState, max_tokens: int | None) -> Outcome:
        todo = self._todo(state)
        if not self._may_continue(todo):
            return Outcome.NOT_READY
        self._kv.trim(state)
        chunk = self._chunk(todo, max_tokens)
        if self._kv.num_missing(state, state.num_planned + chunk) > self._kv.pool.num_free:
            if len(self._queues.running) == 1 and not self._kv.pool.num_pins:
                if state.samples_in_flight:  # it may be about to stop
                    return Outcome.NOT_READY
                self._end_for_capacity(state)
                return Outcome.DONE
            self._blocks_were_short = True
            return Outcome.BLOCKS
        self._place(state, chunk)
        self._decodes_left -= todo == 1
        return Outcome.OK

    def _admit(self, state: RequestState, max_tokens: int | None) -> Outcome:
        if self._admission_closed:
            return Outcome.BLOCKS
        if not self._queues.seats_left:
            return Outcome.SEATS
        hit = self._kv.find_prefix(state)
        if hit.missing in self._pending:
            return Outcome.NOT_READY
        chunk = self._chunk(state.num_known - hit.num_tokens, max_tokens)
        if not self._has_room(state, hit, chunk):
            if not self._queues.running and not self._kv.pool.num_pins:
                self._end_for_capacity(state)
                return Outcome.DONE
            return Outcome.BLOCKS
        reserved = self._reserved
        self._queues.admit(state)
        self._kv.admit(state, hit)
        state.num_planned = hit.num_tokens
        self.admitted[state] = hit.num_tokens
        if state.cached_tokens is None:
            state.cached_tokens = hit.num_tokens
            self.prefix_queries += state.num_known
            self.prefix_hits += hit.num_tokens
        self._place(state, chunk)
        self._reserved = None if reserved is None else reserved + self._kv.num_reserved(state)
        return Outcome.OK

    def _has_room(self, state: RequestState, hit: PrefixHit, chunk: int) -> bool:
        """The admission rule: blocks for the whole known length, beside what running prefills still need, and
        beside the watermark unless nothing else runs."""
        free = self._kv.pool.num_free
        if not self._limits.reserve_full_prompt:
            needed = self._kv.num_needed(hit, hit.num_tokens + chunk)
        else:
            if self._reserved is None:
                self._reserved = sum(self._kv.num_reserved(r) for r in self._queues.running if r.is_prefilling)
            needed = self._kv.num_needed(hit, state.num_known) + self._reserved
        if self._queues.running:
            needed += math.ceil(self._limits.watermark * self._kv.pool.num_usable)
        return needed <= free

    def _place(self, state: RequestState, chunk: int) -> None:
        """Put `chunk` tokens of a running request, whose blocks are known to be free, into the step."""
        start, end = state.num_planned, state.num_planned + chunk
        self.grown[state] = self._kv.grow(state, end)
        self.rows[state] = chunk
        state.num_planned = end
        state.num_in_flight += chunk
        self.token_budget_left -= chunk
        self._reserved = None
        if chunk > 1 and len(self._queues.waiting):
            size = self._kv.block_size
            self._pending.update(state.block_hashes[start // size : end // size])

    def _undo(self, state: RequestState) -> None:
        """Take a request out of this step again; its counts are reset by whoever takes its seat."""
        self.token_budget_left += self.rows.pop(state, 0)
        self.grown.pop(state, None)
        self._reserved = None

    def _end(self, state: RequestState, message: str, code: str) -> None:
        self._undo(state)
        if state in self.admitted:  # no worker has heard of it, so none must hear of its end
            del self.admitted[state]
            self._queues.withdraw_admission(state)
        self._end_request(state, message, code)

    def _end_for_capacity(self, state: RequestState) -> None:
        size, usable = self._kv.block_size, self._kv.pool.num_usable
        self._end(
            state,
            f"the KV cache is too small for this request alone: it has {state.num_known} tokens, the cache holds "
            f"{usable} blocks of {size} tokens; raise cache.memory or send a shorter request",
            "kv_capacity",
        )

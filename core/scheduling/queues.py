"""Who waits, who runs, who is blocked, and which slots are free: the bookkeeping under the scheduler."""

from __future__ import annotations

import contextlib
import logging
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from interlace.request import RequestState, Status

logger = logging.getLogger("interlace.scheduling")


class WaitingQueue:
    """Requests that could be admitted, kept sorted by (order key, time of adding). Sorting is incremental.

    The order key is the policy's: where it raises, or gives keys that cannot be compared, arrival order takes over.
    """

    def __init__(self, order_key: Callable[[RequestState], Any]) -> None:
        self._order_key = order_key
        self._by_arrival = False
        self._serial = 0
        self._keys: list[tuple[Any, int]] = []
        self._requests: list[RequestState] = []

    def __len__(self) -> int:
        return len(self._requests)

    def snapshot(self) -> list[RequestState]:
        return self._requests[:]

    def add(self, request: RequestState) -> None:
        """Insert at the place its order key gives; a preempted request returns to where it was."""
        try:
            self._insert(request)
        except Exception:
            logger.exception("the scheduler's order_key cannot sort requests; arrival order is used from now on")
            self._by_arrival = True
            requests, self._keys, self._requests = self._requests, [], []
            for other in (*requests, request):
                self._insert(other)

    def _insert(self, request: RequestState) -> None:
        """Raises what the order key raises, and then has changed nothing."""
        if not request.order[1]:
            self._serial += 1
            request.order = (request.arrival_time if self._by_arrival else self._order_key(request), self._serial)
        elif self._by_arrival:
            request.order = (request.arrival_time, request.order[1])
        order: tuple[Any, int] = request.order
        # The common case first: a new arrival goes last.
        last = not self._keys or order > self._keys[-1]
        index = len(self._keys) if last else bisect_left(self._keys, order)
        self._keys.insert(index, order)
        self._requests.insert(index, request)

    def remove(self, request: RequestState) -> None:
        index = self._find(request)
        del self._keys[index]
        del self._requests[index]

    def _find(self, request: RequestState) -> int:
        with contextlib.suppress(Exception):  # beyond the end, or keys that cannot be compared
            index = bisect_left(self._keys, request.order)
            if self._requests[index] is request:
                return index
        return self._requests.index(request)  # keys such as NaN do not sort


class Queues:
    """All unfinished requests of one engine. A request is in exactly one of `waiting`, `blocked`, `running`."""

    def __init__(self, max_num_seqs: int, order_key: Callable[[RequestState], Any]) -> None:
        self.requests: dict[str, RequestState] = {}
        self.waiting = WaitingQueue(order_key)
        self.blocked: dict[str, RequestState] = {}
        self.running: dict[RequestState, None] = {}  # in order of admission
        self.released: list[int] = []  # slots whose request finished since the last plan
        self.preempted: list[int] = []  # slots whose request was preempted since the last plan
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    @property
    def seats_left(self) -> int:
        return len(self._free_slots)

    def add(self, request: RequestState) -> None:
        """Take in a new request."""
        self.requests[request.id] = request
        if request.blocked_on:
            self.blocked[request.id] = request
        else:
            self.waiting.add(request)

    def unblock(self, request: RequestState, name: str) -> None:
        """Lift one thing the request is blocked on; it starts waiting when that was the last."""
        request.blocked_on.discard(name)
        if not request.blocked_on and self.blocked.pop(request.id, None) is not None:
            self.waiting.add(request)

    def admit(self, request: RequestState) -> None:
        """Waiting → running: give it a slot and a new generation."""
        self.waiting.remove(request)
        self.running[request] = None
        request.status = Status.RUNNING
        request.slot = self._free_slots.pop()
        request.generation += 1

    def suspend(self, request: RequestState) -> None:
        """Running → waiting (preemption). The caller frees its blocks."""
        self.preempted.append(self._leave(request))
        request.status = Status.WAITING
        request.num_preemptions += 1
        self.waiting.add(request)

    def withdraw_admission(self, request: RequestState) -> None:
        """Running → waiting for a request admitted in the plan being made: no worker has heard of it."""
        self._leave(request)
        request.status = Status.WAITING
        self.waiting.add(request)

    def finish(self, request: RequestState) -> None:
        """Take a request out for good. The caller frees its blocks."""
        del self.requests[request.id]
        if request.status is Status.RUNNING:
            self.released.append(self._leave(request))
        elif self.blocked.pop(request.id, None) is None:
            self.waiting.remove(request)
        request.status = Status.FINISHED

    def _leave(self, request: RequestState) -> int:
        """Give back seat and slot; whatever steps under way still compute for it is stale from now on."""
        del self.running[request]
        slot, request.slot = request.slot, -1
        self._free_slots.append(slot)
        request.generation += 1
        request.num_planned = request.num_in_flight = request.samples_in_flight = 0
        return slot

"""Notices requests that a policy leaves behind while it plans others."""

from __future__ import annotations

import logging

from interlace.scheduling.queues import Queues

logger = logging.getLogger("interlace.engine")


class StarvationWatchdog:
    """Names the policy when a request has not been planned for `timeout` seconds and was left behind.

    A running request is left behind by any step without it; a waiting one when a later arrival runs, or when nothing
    runs at all. A long queue that moves in order is load, not starvation.
    Looks at all requests a few times per timeout, so a step costs one comparison.
    """

    def __init__(self, policy_name: str, timeout: float) -> None:
        self.degraded: str | None = None
        self._policy_name = policy_name
        self._timeout = timeout
        self._next_look = float("-inf")

    def check(self, now: float, queues: Queues) -> None:
        """Call after each plan."""
        if now < self._next_look:
            return
        self._next_look = now + self._timeout / 4
        late = now - self._timeout
        newest = max((request.arrival_time for request in queues.running), default=float("inf"))
        starved = [request for request in queues.running if request.last_planned < late]
        starved += [r for r in queues.waiting.snapshot() if r.last_planned < late and r.arrival_time < newest]
        if not starved:
            self.degraded = None
            return
        worst = min(starved, key=lambda request: request.last_planned)
        self.degraded = (
            f"scheduler '{self._policy_name}' starves {len(starved)} request(s): '{worst.id}' has not been planned for "
            f"{now - worst.last_planned:.1f} s (scheduler.starvation_timeout_s = {self._timeout:g})"
        )
        logger.warning("%s", self.degraded)

"""Notices requests that a policy leaves behind while it plans others."""

from __future__ import annotations

import logging

from interlace.request import RequestState
from interlace.scheduling.queues import Queues

logger = logging.getLogger("interlace.engine")


class StarvationWatchdog:
    """Names the policy when a request has not been planned for `timeout` seconds although steps went on.

    Looks at all requests a few times per timeout, so a step costs one comparison.
    """

    def __init__(self, policy_name: str, timeout: float) -> None:
        self.degraded: str | None = None
        self._policy_name = policy_name
        self._timeout = timeout
        self._next_look = float("-inf")

    def check(self, now: float, queues: Queues) -> None:
        """Call after each step."""
        if now < self._next_look:
            return
        self._next_look = now + self._timeout / 4
        starved = [r for r in (*queues.waiting.snapshot(), *queues.running) if self._is_starved(r, now)]
        if not starved:
            self.degraded = None
            return
        worst = min(starved, key=lambda request: request.last_planned)
        self.degraded = (
            f"scheduler '{self._policy_name}' starves {len(starved)} request(s): '{worst.id}' has not been planned for "
            f"{now - worst.last_planned:.1f} s (scheduler.starvation_timeout_s = {self._timeout:g})"
        )
        logger.warning("%s", self.degraded)

    def _is_starved(self, request: RequestState, now: float) -> bool:
        return now - request.last_planned > self._timeout

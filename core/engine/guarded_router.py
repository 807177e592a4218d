"""What happens when a router fails: the core chooses the least loaded replica itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from interlace.clock import Clock
from interlace.engine.step_watchdog import StepWatchdog
from interlace.interfaces.router import ReplicaView, RoutedRequest, Router, least_loaded

logger = logging.getLogger("interlace.engine")

MAX_FAILURES = 10
"""After this many failed choices in a row, or slow ones, the router is not asked again."""
SLOW_S = 0.1
"""A call that takes longer is slow: no other request is taken meanwhile, and a server's front does nothing else."""
STUCK_S = 10.0
"""A call that takes longer is said to be stuck while it lasts; if it returns at all, the router is not asked again."""
_OPTIONAL = ("on_routed", "on_finished", "on_replica_lost", "on_replica_back", "on_caches_reset")


class GuardedRouter:
    """Runs a router so that its mistakes cost balance or cache hits, never a request.

    A choice fails if the router raises or names no replica that it was offered; `least_loaded` then chooses. The first
    failure is logged with its traceback, and from then on health is degraded. The time spent in the router is added up,
    `timer` being read twice a call; only what a router overrides is called. Not thread-safe, but for `watch`.
    """

    def __init__(self, router: Router, name: str, timer: Callable[[], float]) -> None:
        self.router = router
        self.name = name
        self.account = f"routers:{name}"
        self.degraded: str | None = None
        """Why health is degraded, or None."""
        self.replaced = False
        """Whether the fallback is in charge for good."""
        self.beat = 0
        """Number of the newest call."""
        self.waiting = True
        """Whether no call is under way."""
        self._timer = timer
        self._seconds = 0.0
        self._failures = 0  # in a row
        self._slow = 0  # requests in a row with a slow call
        self._warned = False
        self._slowest = 0.0  # call since the newest request was routed
        self._call = "route"  # the newest one
        self._own = {name for name in _OPTIONAL if getattr(type(router), name) is not getattr(Router, name)}

    def take_seconds(self) -> float:
        """Seconds spent in the router since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def route(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> int:
        """Index of the replica for `request`; there is at least one. Never raises for what the router does."""
        self._check_pace()
        if len(replicas) == 1 or self.replaced:
            return least_loaded(replicas).index
        try:
            chosen = self._timed("route", request, tuple(replicas))
        except (Exception, SystemExit) as error:
            self._failed(f"route raised {type(error).__name__}: {error}", error)
        else:
            for replica in replicas:
                if replica.index == chosen:
                    self._failures = 0
                    return replica.index
            offered = ", ".join(str(replica.index) for replica in replicas)
            self._failed(f"route returned {chosen!r}, which is none of the replicas it was offered ({offered})")
        return least_loaded(replicas).index

    def tell(self, hook: str, *arguments: Any) -> None:
        """Call one of the router's `on_…` methods, if it has it."""
        if hook not in self._own or self.replaced:
            return
        try:
            self._timed(hook, *arguments)
        except (Exception, SystemExit) as error:
            self._complain(f"{hook} raised {type(error).__name__}: {error}", error)

    def watch(self, clock: Clock) -> StepWatchdog:
        """A watchdog that says it when a call does not return: which, and what all threads are doing. No thread can be
        made to leave a loop, so that is all that can be done."""
        return StepWatchdog(self, clock, STUCK_S, lambda error, report: self._stuck(report))

    def hang_report(self) -> str:
        """What is under way, for the watchdog."""
        return f"router '{self.name}' has not returned from {self._call} for {STUCK_S:g} s; no request is taken"

    def _timed(self, hook: str, *arguments: Any) -> Any:
        self.beat += 1
        self._call, self.waiting = hook, False
        began = self._timer()
        try:
            return getattr(self.router, hook)(*arguments)
        finally:
            spent = self._timer() - began
            self.waiting = True
            self._seconds += spent
            self._slowest = max(self._slowest, spent)

    def _check_pace(self) -> None:
        """Look back on the calls for one request, at the next one."""
        slowest, self._slowest = self._slowest, 0.0
        self._slow = self._slow + 1 if slowest > SLOW_S else 0
        if self._slow and not self._warned:
            self._warned = True
            logger.warning("router '%s' took %.3f s for a call; no request is taken meanwhile", self.name, slowest)
        if self.replaced:
            return
        if slowest > STUCK_S:
            self._replace(f"a call took {slowest:.1f} s")
        elif self._slow == MAX_FAILURES:
            self._replace(
                f"{self._slow} requests in a row had a call of more than {SLOW_S:g} s, the last {slowest:.3f} s"
            )

    def _stuck(self, report: str) -> None:
        self.degraded = self.hang_report()
        logger.error("%s", report)

    def _failed(self, reason: str, error: BaseException | None = None) -> None:
        self._failures += 1
        self._complain(f"{reason}; the least loaded replica was chosen", error)
        if self._failures == MAX_FAILURES:
            self._replace(f"it failed {self._failures} times in a row: {reason}")

    def _replace(self, reason: str) -> None:
        self.replaced = True
        self.degraded = f"router '{self.name}' was replaced by least_loaded until a restart: {reason}"
        logger.error("%s", self.degraded)

    def _complain(self, reason: str, error: BaseException | None) -> None:
        """Once: a router that fails does so for every request."""
        if self.degraded is None:
            self.degraded = f"router '{self.name}' failed: {reason}"
            logger.warning("%s", self.degraded, exc_info=error)

"""What happens when a router fails: the core chooses the least loaded replica itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from interlace.interfaces.router import ReplicaView, RoutedRequest, Router, least_loaded

logger = logging.getLogger("interlace.engine")

MAX_FAILURES = 10
"""After this many failed choices in a row the router is not asked again."""
_OPTIONAL = ("on_routed", "on_finished", "on_replica_lost", "on_replica_back", "on_caches_reset")


class GuardedRouter:
    """Runs a router so that its mistakes cost balance or cache hits, never a request.

    A choice fails if the router raises or names no replica that it was offered; `least_loaded` then chooses. The first
    failure is logged with its traceback, and from then on health is degraded. The time spent in the router is added up,
    `timer` being read twice a call; only what a router overrides is called. Not thread-safe.
    """

    def __init__(self, router: Router, name: str, timer: Callable[[], float]) -> None:
        self.router = router
        self.name = name
        self.account = f"routers:{name}"
        self.failures = 0  # in a row
        self.degraded: str | None = None
        """Why health is degraded, or None."""
        self._timer = timer
        self._seconds = 0.0
        self._own = {name for name in _OPTIONAL if getattr(type(router), name) is not getattr(Router, name)}

    @property
    def replaced(self) -> bool:
        """Whether the fallback is in charge for good."""
        return self.failures >= MAX_FAILURES

    def take_seconds(self) -> float:
        """Seconds spent in the router since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def route(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> int:
        """Index of the replica for `request`; there is at least one. Never raises for what the router does."""
        if len(replicas) == 1 or self.replaced:
            return least_loaded(replicas).index
        began = self._timer()
        try:
            chosen = self.router.route(request, tuple(replicas))
        except (Exception, SystemExit) as error:
            self._failed(f"route raised {type(error).__name__}: {error}", error)
        else:
            for replica in replicas:
                if replica.index == chosen:
                    self.failures = 0
                    return replica.index
            offered = ", ".join(str(replica.index) for replica in replicas)
            self._failed(f"route returned {chosen!r}, which is none of the replicas it was offered ({offered})")
        finally:
            self._seconds += self._timer() - began
        return least_loaded(replicas).index

    def tell(self, hook: str, *arguments: Any) -> None:
        """Call one of the router's `on_…` methods, if it has it."""
        if hook not in self._own or self.replaced:
            return
        began = self._timer()
        try:
            getattr(self.router, hook)(*arguments)
        except (Exception, SystemExit) as error:
            self._complain(f"{hook} raised {type(error).__name__}: {error}", error)
        self._seconds += self._timer() - began

    def _failed(self, reason: str, error: BaseException | None = None) -> None:
        self.failures += 1
        self._complain(f"{reason}; the least loaded replica was chosen", error)
        if self.replaced:
            self.degraded = (
                f"router '{self.name}' was replaced by least_loaded until a restart: it failed {self.failures} times "
                f"in a row: {reason}"
            )
            logger.error("%s", self.degraded)

    def _complain(self, reason: str, error: BaseException | None) -> None:
        """Once: a router that fails does so for every request."""
        if self.degraded is None:
            self.degraded = f"router '{self.name}' failed: {reason}"
            logger.warning("%s", self.degraded, exc_info=error)

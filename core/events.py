"""Event hooks as plain calls: nothing is spent when nobody listens, and a listener cannot hurt the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from interlace.clock import Clock, MonotonicClock

if TYPE_CHECKING:
    import pluggy

    from interlace.messages import RequestSummary, StepStats

logger = logging.getLogger(__name__)


class Subscriber(NamedTuple):
    """One plugin's implementation of an event hook."""

    plugin: str
    function: Callable[..., Any]
    takes_argument: bool
    """Hook implementations may leave out arguments they do not need."""


class Events:
    """The event hooks of one engine. Called from one thread at a time, in the front process."""

    def __init__(self, manager: pluggy.PluginManager, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self._seconds: dict[str, float] = {}
        self._failed: set[tuple[str, str]] = set()
        self._start = _subscribers(manager, "on_engine_start")
        self._step = _subscribers(manager, "on_step")
        self._request_finished = _subscribers(manager, "on_request_finished")
        self._shutdown = _subscribers(manager, "on_shutdown")

    @property
    def has_step_subscribers(self) -> bool:
        """Whether `StepStats` need to be made for plugins."""
        return bool(self._step)

    @property
    def has_request_subscribers(self) -> bool:
        """Whether `RequestSummary` need to be made for plugins."""
        return bool(self._request_finished)

    def on_engine_start(self, settings: Mapping[str, Any]) -> None:
        """Tell that the engine is ready; `settings` as of `interlace.config.effective`."""
        self._call("on_engine_start", self._start, settings)

    def on_step(self, stats: StepStats) -> None:
        """Tell that a step was completed."""
        if self._step:
            self._call("on_step", self._step, stats)

    def on_request_finished(self, summary: RequestSummary) -> None:
        """Tell that a request ended."""
        if self._request_finished:
            self._call("on_request_finished", self._request_finished, summary)

    def on_shutdown(self) -> None:
        """Tell that the engine is about to stop."""
        self._call("on_shutdown", self._shutdown, None)

    def seconds_by_plugin(self) -> dict[str, float]:
        """Seconds spent in each plugin's event hooks so far."""
        return dict(self._seconds)

    def _call(self, hook: str, subscribers: Sequence[Subscriber], argument: Any) -> None:
        for plugin, function, takes_argument in subscribers:
            begin = self._clock.now()
            try:
                if takes_argument:
                    function(argument)
                else:
                    function()
            except Exception:
                if (plugin, hook) not in self._failed:
                    self._failed.add((plugin, hook))
                    logger.exception("%s of plugin %s failed; further failures of it are not reported", hook, plugin)
            finally:
                self._seconds[plugin] = self._seconds.get(plugin, 0.0) + self._clock.now() - begin


def _subscribers(manager: pluggy.PluginManager, hook: str) -> list[Subscriber]:
    # Pluggy keeps implementations in the reverse of the order in which it calls them.
    implementations = reversed(getattr(manager.hook, hook).get_hookimpls())
    return [Subscriber(impl.plugin_name, impl.function, bool(impl.argnames)) for impl in implementations]

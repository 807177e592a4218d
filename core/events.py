"""Event hooks as plain calls: nothing is spent when nobody listens, and a listener cannot hurt the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from interlace.clock import Clock, MonotonicClock

if TYPE_CHECKING:
    import pluggy

    from interlace.messages import RequestSummary, StepStats

logger = logging.getLogger(__name__)


MAX_ERRORS = 10
"""A subscriber that has raised this often is no longer called, until the engine is started again."""


class Subscriber:
    """One plugin's implementation of an event hook."""

    __slots__ = ("errors", "function", "hook", "plugin", "takes_argument")

    def __init__(self, hook: str, plugin: str, function: Callable[..., Any], takes_argument: bool) -> None:
        self.hook = hook
        self.plugin = plugin
        self.function = function
        self.takes_argument = takes_argument  # hook implementations may leave out arguments they do not need
        self.errors = 0

    def failed(self) -> bool:
        """Count and report the exception being handled; False: it is the last one, the subscriber is done."""
        self.errors += 1
        if self.errors == 1:
            logger.exception(
                "%s of plugin %s failed; it is disabled after %d errors, the ones before that are only counted",
                self.hook,
                self.plugin,
                MAX_ERRORS,
            )
        if self.errors >= MAX_ERRORS:
            logger.error("%s of plugin %s is disabled: it has failed %d times", self.hook, self.plugin, self.errors)
            return False
        return True


class Events:
    """The event hooks of one engine. Called from one thread at a time, in the front process.

    Subscribers know nothing of each other: one that raises does not keep the next from being called.
    """

    def __init__(self, manager: pluggy.PluginManager, clock: Clock | None = None) -> None:
        self._timer = (clock or MonotonicClock()).now
        self._seconds: dict[str, float] = {}
        self._reported: dict[str, float] = {}  # of `_seconds`, what `on_step` has told
        self._start = _subscribers(manager, "on_engine_start")
        self._step = _subscribers(manager, "on_step")
        self._request_finished = _subscribers(manager, "on_request_finished")
        self._shutdown = _subscribers(manager, "on_shutdown")
        self._all = (*self._start, *self._step, *self._request_finished, *self._shutdown)

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
        self._start = self._call(self._start, settings)

    def on_step(self, stats: StepStats) -> None:
        """Tell that a step was completed. What event hooks have cost since the last step is added to the stats."""
        if self._step:
            for plugin, seconds in self._seconds.items():
                stats.plugin_seconds[f"events:{plugin}"] = seconds - self._reported.get(plugin, 0.0)
            self._reported = dict(self._seconds)
            self._step = self._call(self._step, stats)

    def on_request_finished(self, summary: RequestSummary) -> None:
        """Tell that a request ended."""
        if self._request_finished:
            self._request_finished = self._call(self._request_finished, summary)

    def on_shutdown(self) -> None:
        """Tell that the engine is about to stop."""
        self._call(self._shutdown, None)

    def seconds_by_plugin(self) -> dict[str, float]:
        """Plugin (`package:entry_point`) → seconds spent in its event hooks so far."""
        return dict(self._seconds)

    def errors_by_plugin(self) -> dict[str, int]:
        """Plugin → how often its event hooks have raised, for those that have."""
        errors: dict[str, int] = {}
        for subscriber in self._all:
            if subscriber.errors:
                errors[subscriber.plugin] = errors.get(subscriber.plugin, 0) + subscriber.errors
        return errors

    def _call(self, subscribers: list[Subscriber], argument: Any) -> list[Subscriber]:
        """Call all of them; returns those that are still in service."""
        left = subscribers
        for subscriber in subscribers:
            began = self._timer()
            try:
                if subscriber.takes_argument:
                    subscriber.function(argument)
                else:
                    subscriber.function()
            except (Exception, SystemExit):
                if not subscriber.failed():
                    left = [other for other in left if other is not subscriber]
            plugin = subscriber.plugin
            self._seconds[plugin] = self._seconds.get(plugin, 0.0) + self._timer() - began
        return left


def _subscribers(manager: pluggy.PluginManager, hook: str) -> list[Subscriber]:
    # Pluggy keeps implementations in the reverse of the order in which it calls them.
    implementations = reversed(getattr(manager.hook, hook).get_hookimpls())
    return [Subscriber(hook, impl.plugin_name, impl.function, bool(impl.argnames)) for impl in implementations]

"""Event hooks: skipped without subscribers, accounted per plugin, harmless when they raise."""

from __future__ import annotations

import logging
import types

from interlace import hookimpl
from interlace.clock import VirtualClock
from interlace.config import load_settings
from interlace.plugin_manager import PluginManager


def plugin(name: str, **hooks) -> types.ModuleType:
    module = types.ModuleType(name)
    for hook, function in hooks.items():
        setattr(module, hook, hookimpl(function))
    return module


def events(*plugins, clock=None):
    return PluginManager(load_settings(env={}).settings, plugins, clock).events


def test_without_subscribers_nothing_is_done():
    quiet = events()
    assert not quiet.has_step_subscribers and not quiet.has_request_subscribers
    quiet.on_step(None)
    quiet.on_shutdown()
    assert quiet.seconds_by_plugin() == {}


def test_subscribers_are_called_with_what_they_ask_for():
    calls = []
    noisy = events(
        plugin("one", on_step=lambda stats: calls.append(("one", stats)), on_shutdown=lambda: calls.append("bye")),
        plugin("two", on_step=lambda: calls.append("two")),
    )
    assert noisy.has_step_subscribers and not noisy.has_request_subscribers
    noisy.on_step("stats")
    noisy.on_shutdown()
    assert sorted(map(str, calls)) == ["('one', 'stats')", "bye", "two"]


def test_time_is_accounted_per_plugin():
    clock = VirtualClock()
    timed = events(
        plugin("slow", on_step=lambda: clock.advance(2.0)), plugin("quick", on_step=lambda: None), clock=clock
    )
    timed.on_step(None)
    timed.on_step(None)
    assert timed.seconds_by_plugin() == {"slow:given in code": 4.0, "quick:given in code": 0.0}


def test_subscriber_that_raises_is_logged_once(caplog):
    calls = []

    def explode(stats):
        calls.append(stats)
        raise RuntimeError("metrics server is down")

    fragile = events(plugin("bad", on_step=explode), plugin("good", on_step=lambda stats: calls.append(-stats)))
    with caplog.at_level(logging.ERROR):
        for step in (1, 2, 3):
            fragile.on_step(step)
    assert sorted(calls) == [-3, -2, -1, 1, 2, 3]
    (record,) = caplog.records
    assert "on_step of plugin bad:given in code failed" in record.getMessage()
    assert "metrics server is down" in caplog.text

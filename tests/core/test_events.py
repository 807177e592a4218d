"""Event hooks: skipped without subscribers, accounted per plugin, harmless when they raise."""

from __future__ import annotations

import logging
import types

import pytest

from interlace import hookimpl
from interlace.clock import VirtualClock
from interlace.config import load_settings
from interlace.events import MAX_ERRORS
from interlace.messages import StepStats
from interlace.plugin_manager import PluginManager


def plugin(name: str, **hooks) -> types.ModuleType:
    module = types.ModuleType(name)
    for hook, function in hooks.items():
        setattr(module, hook, hookimpl(function))
    return module


def events(*plugins, clock=None):
    return PluginManager(load_settings(env={}).settings, plugins, clock).events


def stats(**seconds: float) -> StepStats:
    numbers = {name: 0 for name in StepStats.__struct_fields__ if name not in ("degraded", "plugin_seconds")}
    return StepStats(**numbers, plugin_seconds=seconds)


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
    timed.on_step(stats())
    timed.on_step(stats())
    assert timed.seconds_by_plugin() == {"slow:given in code": 4.0, "quick:given in code": 0.0}


def test_the_time_since_the_last_step_is_in_the_stats():
    clock = VirtualClock()
    seen = []
    slow = plugin("slow", on_step=lambda: clock.advance(2.0), on_request_finished=lambda: clock.advance(1.0))
    watch = plugin("watch", on_step=lambda stats: seen.append(dict(stats.plugin_seconds)))
    timed = events(slow, watch, clock=clock)
    timed.on_step(stats(other=5.0))
    timed.on_request_finished(None)
    timed.on_request_finished(None)
    timed.on_step(stats())
    timed.on_step(stats())
    assert seen == [
        {"other": 5.0},
        {"events:slow:given in code": 4.0, "events:watch:given in code": 0.0},
        {"events:slow:given in code": 2.0, "events:watch:given in code": 0.0},
    ]


@pytest.mark.parametrize("fault", [RuntimeError("metrics server is down"), SystemExit("metrics server is down")])
def test_subscriber_that_raises_is_disabled_and_the_others_do_not_notice(fault, caplog):
    calls = []

    def explode(stats):
        calls.append("bad")
        raise fault

    fragile = events(
        plugin("first", on_step=lambda stats: calls.append("first")),
        plugin("bad", on_step=explode, on_request_finished=lambda: calls.append("finished")),
        plugin("last", on_step=lambda stats: calls.append("last")),
    )
    with caplog.at_level(logging.ERROR):
        for _ in range(MAX_ERRORS + 5):
            fragile.on_step(stats())
    assert calls.count("first") == calls.count("last") == MAX_ERRORS + 5
    assert calls.count("bad") == MAX_ERRORS and fragile.errors_by_plugin() == {"bad:given in code": MAX_ERRORS}
    first, disabled = [record.getMessage() for record in caplog.records]
    assert first.startswith("on_step of plugin bad:given in code failed; it is disabled after 10 errors")
    assert disabled == "on_step of plugin bad:given in code is disabled: it has failed 10 times"
    assert caplog.text.count("metrics server is down") == 1
    fragile.on_request_finished(None)
    assert calls[-1] == "finished", "its other hooks go on"
    assert fragile.has_step_subscribers


def test_the_only_subscriber_disabled_costs_nothing_more():
    def explode():
        raise ValueError

    fragile = events(plugin("bad", on_step=explode))
    for _ in range(MAX_ERRORS):
        assert fragile.has_step_subscribers
        fragile.on_step(stats())
    assert not fragile.has_step_subscribers


def test_errors_below_the_limit_disable_nothing(caplog):
    calls = []

    def flaky():
        calls.append(len(calls))
        if len(calls) % 2:
            raise ConnectionError("again")

    fragile = events(plugin("flaky", on_step=flaky))
    for _ in range(2 * MAX_ERRORS - 2):
        fragile.on_step(stats())
    assert len(calls) == 2 * MAX_ERRORS - 2 and fragile.has_step_subscribers
    assert fragile.errors_by_plugin() == {"flaky:given in code": MAX_ERRORS - 1}
    assert len(caplog.records) == 1


def test_a_new_engine_calls_it_again():
    def explode():
        raise ValueError

    bad = plugin("bad", on_step=explode)
    first = events(bad)
    for _ in range(MAX_ERRORS):
        first.on_step(stats())
    assert events(bad).has_step_subscribers and not first.has_step_subscribers

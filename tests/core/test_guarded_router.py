"""A router that fails, is slow, or never returns: what it costs, and what is said of it."""

from __future__ import annotations

import threading
import time

import pytest

from interlace.clock import MonotonicClock, VirtualClock
from interlace.engine import guarded_router
from interlace.interfaces.router import Router
from interlace.testing.fleet import Fleet, fleet_request


def test_the_first_failure_of_a_router_is_logged_and_degrades_health(caplog):
    class Flaky(Router):
        def route(self, request, replicas):
            if int(request.id) % 3:
                raise RuntimeError("by design")
            return 0

    fleet = Fleet(Flaky(Router.Options()), 2, name="flaky")
    for number in range(40):
        fleet.add(fleet_request(str(number)))
    warnings = [record for record in caplog.records if "router 'flaky' failed" in record.message]
    assert len(warnings) == 1 and "RuntimeError: by design" in warnings[0].message and warnings[0].exc_info
    health = fleet.replicas.health()
    assert health.status == "degraded" and "the least loaded replica was chosen" in health.reason
    assert all(part.status == "ok" for part in health.replicas)


def test_a_router_that_always_fails_is_replaced(caplog):
    class Broken(Router):
        calls = 0

        def route(self, request, replicas):
            self.calls += 1
            return "nowhere"

    router = Broken(Router.Options())
    fleet = Fleet(router, 2, name="broken")
    for number in range(20):
        fleet.add(fleet_request(str(number)))
    assert router.calls == 10
    assert "router 'broken' was replaced by least_loaded until a restart" in fleet.replicas.health().reason
    assert sum("router 'broken'" in record.message for record in caplog.records) == 2
    assert [len(client.waiting) for client in fleet.clients] == [10, 10]


class Paced(Router):
    """The first one; each of its calls takes `seconds` by the clock."""

    seconds = 0.0

    def __init__(self, clock):
        super().__init__(Router.Options())
        self.clock = clock
        self.calls = 0

    def route(self, request, replicas):
        self.calls += 1
        self.clock.advance(self.seconds)
        return replicas[0].index


class SlowToHear(Paced):
    def route(self, request, replicas):
        self.calls += 1
        return replicas[0].index

    def on_routed(self, request, replica):
        self.clock.advance(self.seconds)


def paced(kind, seconds):
    clock = VirtualClock()
    router = kind(clock)
    router.seconds = seconds
    fleet = Fleet(router, 2, name="paced")
    fleet.guard._timer = clock.now
    return router, fleet


@pytest.mark.parametrize("kind", [Paced, SlowToHear])
def test_a_router_that_is_slow_time_after_time_is_replaced(kind, caplog):
    router, fleet = paced(kind, 0.2)
    for number in range(9):
        fleet.add(fleet_request(str(number)))
    router.seconds = 0.05
    fleet.add(fleet_request("quick"))
    router.seconds = 0.2
    for number in range(10, 19):
        fleet.add(fleet_request(str(number)))
    assert fleet.replicas.health().status == "ok", "not ten in a row so far"
    for number in range(20, 30):
        fleet.add(fleet_request(str(number)))
    assert router.calls == 20
    health = fleet.replicas.health()
    assert health.status == "degraded"
    assert "10 requests in a row had a call of more than 0.1 s, the last 0.200 s" in health.reason
    assert sum("router 'paced'" in record.message for record in caplog.records) == 2, "the first one, and the last"
    assert all(len(client.waiting) for client in fleet.clients)


def test_a_router_that_was_stuck_is_not_asked_again():
    router, fleet = paced(Paced, 11.0)
    for number in range(3):
        fleet.add(fleet_request(str(number)))
    assert router.calls == 1
    assert "replaced by least_loaded until a restart: a call took 11.0 s" in fleet.replicas.health().reason


def test_a_router_that_does_not_return_is_named_with_its_stack(caplog, monkeypatch):
    """Health is told meanwhile, although the books are locked."""
    monkeypatch.setattr(guarded_router, "STUCK_S", 0.2)
    go_on = threading.Event()

    class Endless(Router):
        def route(self, request, replicas):
            while not go_on.wait(0.01):
                pass
            return replicas[0].index

    fleet = Fleet(Endless(Router.Options()), 2, name="endless", clock=MonotonicClock())
    fleet.guard._timer = MonotonicClock().now
    adding = threading.Thread(target=fleet.add, args=(fleet_request("a"),), name="the front")
    adding.start()
    while fleet.guard.degraded is None:
        time.sleep(0.005)
    health = fleet.replicas.health()
    go_on.set()
    adding.join()
    assert health.status == "degraded"
    assert "router 'endless' has not returned from route for 0.2 s; no request is taken" in health.reason
    (told,) = [record.message for record in caplog.records if "'endless' has not" in record.message]
    assert "thread the front:" in told and "in route" in told
    assert fleet.clients[0].waiting, "it returned after all"
    fleet.add(fleet_request("b"))
    assert "replaced by least_loaded" in fleet.guard.degraded
    fleet.replicas.shutdown()
    assert "interlace-watchdog" not in {thread.name for thread in threading.enumerate()}

"""Several engines behind one front: where requests go, what a death takes, what comes back. Engines are scripted."""

from __future__ import annotations

import random

import pytest

from interlace.engine.client import EngineHealth
from interlace.errors import EngineDeadError, EngineRestartingError
from interlace.interfaces.router import Router, least_loaded
from interlace.testing.fleet import Fleet, fleet_request, run_fleet


class First(Router):
    """The first one that is offered; notes what it hears."""

    def __init__(self, options=None):
        super().__init__(options or Router.Options())
        self.heard = []
        self.seen = []

    def route(self, request, replicas):
        self.seen.append((request.id, [replica.index for replica in replicas]))
        return replicas[0].index

    def on_routed(self, request, replica):
        self.heard.append(("routed", request.id, replica.index))

    def on_finished(self, request, replica):
        self.heard.append(("finished", request.id, replica.index))

    def on_replica_lost(self, replica):
        self.heard.append(("lost", replica.index))

    def on_replica_back(self, replica):
        self.heard.append(("back", replica.index))

    def on_caches_reset(self):
        self.heard.append(("reset",))


class Wild(Router):
    """Anywhere; at times it fails."""

    def __init__(self, seed, faults=()):
        super().__init__(Router.Options())
        self.rng = random.Random(seed)
        self.faults = faults

    def route(self, request, replicas):
        fault = self.rng.choice([None, None, *self.faults])
        if isinstance(fault, type):
            raise fault("by design")
        return self.rng.choice(replicas).index if fault is None else fault

    def on_routed(self, request, replica):
        if self.faults and self.rng.random() < 0.2:
            raise ValueError("by design")

    on_finished = on_routed


class Idlest(Router):
    def route(self, request, replicas):
        return least_loaded(replicas).index


def idlest(count=2) -> Fleet:
    return Fleet(Idlest(Router.Options()), count)


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_requests_go_where_the_router_says_and_their_outputs_say_whose_they_are():
    fleet = idlest()
    fleet.add(fleet_request("a"))
    fleet.add(fleet_request("b"))
    assert [fleet.where("a"), fleet.where("b")] == [0, 1]
    fleet.clients[1].step()
    fleet.clients[0].step()
    assert [(output.engine, output.stats.engine, output.request_ids) for output in fleet.outputs] == [
        (1, 1, ["b"]),
        (0, 0, ["a"]),
    ]


def test_requests_of_one_call_are_spread_and_enter_each_engine_together():
    fleet = idlest(3)
    calls = []
    for index, client in enumerate(fleet.clients):
        add = client.add
        client.add = lambda requests, add=add, index=index: (calls.append((index, len(requests))), add(requests))
    fleet.add(*(fleet_request(str(number)) for number in range(9)))
    assert sorted(calls) == [(0, 3), (1, 3), (2, 3)]


def test_samples_of_a_prompt_are_one_request_of_the_router():
    router = First()
    fleet = Fleet(router, 2)
    fleet.add(*(fleet_request(f"r.{i}", group="r", index=i, max_tokens=i + 1) for i in range(3)), fleet_request("s"))
    assert router.seen == [("r", [0, 1]), ("s", [0, 1])]
    fleet.clients[0].step()
    assert [heard for heard in router.heard if heard[0] == "finished"] == []
    for _ in range(2):
        fleet.clients[0].step()
    assert router.heard == [("routed", "r", 0), ("routed", "s", 0), ("finished", "r", 0), ("finished", "s", 0)]


def test_an_abort_reaches_the_one_that_has_the_request():
    fleet = idlest(3)
    fleet.add(*(fleet_request(name) for name in "abc"))
    fleet.replicas.abort(["b", "nobody"])
    assert [set(client.waiting) for client in fleet.clients] == [{"a"}, set(), {"c"}]
    fleet.settle()
    assert fleet.outcomes == {"a": ["length"], "b": ["abort"], "c": ["length"]}


def test_the_least_loaded_counts_waiting_more_than_running():
    fleet = idlest()
    for number in range(4):
        fleet.add(fleet_request(f"warm{number}", max_tokens=50))
    fleet.clients[0].step()  # two run at replica 0, two wait at replica 1
    for number in range(2):
        fleet.add(fleet_request(f"new{number}"))
    assert [fleet.where("new0"), fleet.where("new1")] == [0, 0]


# ── deaths ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_death_takes_its_own_requests_and_new_ones_go_to_the_living():
    fleet = idlest()
    fleet.add(fleet_request("a"), fleet_request("b"))
    fleet.clients[1].fall()
    fleet.clients[1].tell()
    [(error, ids, index)] = fleet.losses
    assert (ids, index) == (["b"], 1)
    assert type(error) is EngineRestartingError and error.retry_after == 1.0, "another one takes it at once"
    assert str(error) == "replica 1 of 2: it fell, a new one starts"
    fleet.add(fleet_request("c"), fleet_request("d"))
    assert set(fleet.clients[0].waiting) == {"a", "c", "d"}
    fleet.clients[1].come_back()
    fleet.add(fleet_request("e"))
    assert fleet.where("e") == 1
    fleet.settle()
    assert fleet.outcomes["b"] == ["lost"] and fleet.deaths == []


def test_a_death_that_is_not_known_yet_costs_no_request():
    """The engine is gone, the thread that tells so is on its way: what is refused goes to another one."""
    router = First()
    fleet = Fleet(router, 3)
    fleet.clients[0].fall()
    fleet.add(fleet_request("a"), fleet_request("b"))
    assert router.seen == [("a", [0, 1, 2]), ("b", [0, 1, 2]), ("a", [1, 2]), ("b", [1, 2])]
    assert set(fleet.clients[1].waiting) == {"a", "b"}
    assert router.heard[:4] == [("routed", "a", 0), ("routed", "b", 0), ("finished", "a", 0), ("finished", "b", 0)]
    fleet.clients[0].tell()
    assert fleet.losses[0][1] == [], "nobody is told of a death who had moved on"
    fleet.settle()


def test_the_router_hears_of_the_end_of_lost_requests_and_of_what_comes_back():
    router = First()
    fleet = Fleet(router, 2)
    fleet.add(fleet_request("r.0", group="r"), fleet_request("r.1", group="r", index=1))
    fleet.clients[0].fall()
    fleet.clients[0].tell()
    fleet.clients[0].come_back()
    assert router.heard == [("routed", "r", 0), ("finished", "r", 0), ("lost", 0), ("back", 0)]


def test_while_all_restart_the_first_that_will_be_back_speaks():
    fleet = idlest()
    for client in fleet.clients:
        client.fall()
        client.tell()
    with pytest.raises(EngineRestartingError, match="a new one starts") as caught:
        fleet.add(fleet_request("a"))
    assert caught.value.retry_after == 2.0
    assert fleet.replicas.health().status == "dead", "scripted clients raise; a supervisor says restarting"
    fleet.clients[1].come_back()
    fleet.add(fleet_request("a"))
    fleet.settle()


def test_none_is_sent_when_one_of_a_call_cannot_be():
    fleet = idlest()
    for client in fleet.clients:
        client.fall()
    with pytest.raises(EngineDeadError):
        fleet.add(fleet_request("a"), fleet_request("b"))
    for client in fleet.clients:
        client.tell()
        client.come_back()
    assert fleet.losses[0][1] == fleet.losses[1][1] == []
    assert all(replica.num_waiting == 0 for replica in fleet.replicas._replicas)


def test_a_bug_while_sending_leaves_nothing_behind():
    fleet = idlest()

    def fall(requests):
        raise MemoryError("no room")

    fleet.clients[1].add = fall
    with pytest.raises(MemoryError):
        fleet.add(fleet_request("a"), fleet_request("b"))
    assert [replica.num_waiting for replica in fleet.replicas._replicas] == [0, 0]
    assert not fleet.clients[0].waiting, "what the other one had got was aborted"


def test_the_last_one_that_dies_for_good_is_the_end():
    fleet = idlest()
    for index, client in enumerate(fleet.clients):
        fleet.add(fleet_request(f"r{index}"))
        client.fall(for_good=True)
        client.tell()
    assert [error.args for error in fleet.deaths] == [("it fell",)]
    assert [loss[1] for loss in fleet.losses] == [["r0"]], "the front fails all that is left"
    with pytest.raises(EngineDeadError, match="it fell") as caught:
        fleet.add(fleet_request("a"))
    assert type(caught.value) is EngineDeadError


def test_one_that_is_dead_for_good_leaves_the_others():
    fleet = idlest()
    fleet.clients[0].fall(for_good=True)
    fleet.clients[0].tell()
    fleet.add(fleet_request("a"))
    assert fleet.where("a") == 1 and fleet.deaths == []
    health = fleet.replicas.health()
    assert (health.status, health.reason) == ("degraded", "replica 0: it fell")
    assert health.last_cause == "replica 0: it fell"


# ── all of them ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_health_is_that_of_all():
    fleet = idlest()
    fleet.add(*(fleet_request(name) for name in "abc"))
    fleet.clients[0].step()
    health = fleet.replicas.health()
    assert (health.status, health.num_running, health.num_waiting, health.steps) == ("ok", 2, 1, 1)
    assert [part.num_running for part in health.replicas] == [2, 0]


def test_health_of_a_supervised_one_that_restarts():
    fleet = idlest()
    fleet.clients[0].health = lambda timeout: EngineHealth(status="restarting", reason="it fell", restarts=2)
    health = fleet.replicas.health()
    assert (health.status, health.reason, health.restarts) == ("degraded", "replica 0: it fell", 2)
    fleet.clients[1].health = fleet.clients[0].health
    assert fleet.replicas.health().status == "restarting"


def test_operations_run_in_all_that_work():
    router = First()
    fleet = Fleet(router, 3)
    assert fleet.replicas.control("reset_prefix_cache") == ["reset_prefix_cache"] * 3
    assert router.heard == [("reset",)]
    fleet.clients[1].fall()
    assert fleet.replicas.control("echo") == ["echo", None, "echo"]
    for client in fleet.clients:
        client.fall()
    with pytest.raises(EngineDeadError):
        fleet.replicas.control("echo")


def test_an_operation_that_fails_raises():
    fleet = idlest()

    def fail(operation):
        raise ValueError(f"no operation '{operation}'")

    fleet.clients[1].control = fail
    with pytest.raises(ValueError, match="no operation 'dance'"):
        fleet.replicas.control("dance")


def test_if_one_cannot_start_none_is_left_behind():
    fleet = idlest(3)

    def fail(*arguments):
        raise OSError("no such disk")

    fleet.clients[1].start = fail
    with pytest.raises(OSError, match="no such disk"):
        fleet.replicas.start(lambda output: None, lambda error: None)
    assert all(client.closed for client in fleet.clients)


def test_after_shutdown_nothing_can_be_asked():
    fleet = idlest()
    fleet.replicas.shutdown()
    fleet.replicas.shutdown()
    assert all(client.closed for client in fleet.clients)
    with pytest.raises(EngineDeadError, match="shut down"):
        fleet.add(fleet_request("a"))
    fleet.clients[0].fall()
    fleet.clients[0].tell()
    assert fleet.losses == [] and fleet.deaths == []


# ── routers that fail ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(20))
def test_no_request_is_lost_over_random_deaths(seed):
    """The fleet checks after every action that each request is in one place, and at the end that each ended once."""
    fleet = run_fleet(Wild(seed), seed, count=4)
    assert {reason for (reason,) in fleet.outcomes.values()} >= {"length", "abort", "lost"}
    assert fleet.guard.degraded is None


@pytest.mark.parametrize("seed", range(10))
def test_nor_with_a_router_that_fails_in_every_way(seed):
    faults = (RuntimeError, SystemExit, -1, 99, "0", None, [], 0.5)
    fleet = run_fleet(Wild(seed, faults), seed)
    assert fleet.guard.degraded is not None


def test_the_time_spent_in_the_router_is_accounted():
    times = iter(range(1000))
    fleet = Fleet(First(), 2)
    fleet.guard._timer = lambda: float(next(times))
    fleet.add(fleet_request("a"))
    fleet.clients[0].step()
    assert fleet.outputs[0].stats.plugin_seconds == {"routers:tested": 2.0}  # route, on_routed
    fleet.clients[0].step()
    assert fleet.outputs[1].stats.plugin_seconds == {}

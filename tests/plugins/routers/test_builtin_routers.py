"""What is special about each built-in router."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from interlace.plugins.routers.least_loaded import LeastLoaded
from interlace.plugins.routers.prefix_affinity import PrefixAffinity
from interlace.plugins.routers.round_robin import RoundRobin
from interlace.testing.fleet import BLOCK_SIZE, Fleet, fleet_request
from interlace.testing.router_suite import View

PROMPTS = {name: [number + 1] * (BLOCK_SIZE * 4) for number, name in enumerate("abcdef")}
"""Name → four full blocks."""


def fleet_of(router, count=2, **options) -> Fleet:
    return Fleet(router(router.Options(**options)), count)


def send(fleet, name, tokens, **more) -> int:
    """Index of the replica that got it."""
    fleet.add(fleet_request(name, tokens, **more))
    return fleet.where(name)


def finish(fleet) -> None:
    while any(client.waiting or client.running for client in fleet.clients):
        for client in fleet.clients:
            client.step()


class TestRoundRobin:
    def test_one_after_the_other(self):
        fleet = fleet_of(RoundRobin, 3)
        assert [send(fleet, str(number), [1]) for number in range(7)] == [0, 1, 2, 0, 1, 2, 0]

    def test_the_turns_go_on_without_one_that_is_lost(self):
        fleet = fleet_of(RoundRobin, 3)
        assert [send(fleet, str(number), [1]) for number in range(4)] == [0, 1, 2, 0]
        fleet.clients[1].fall()
        fleet.clients[1].tell()
        assert [send(fleet, f"without{number}", [1]) for number in range(3)] == [2, 0, 2]
        fleet.clients[1].come_back()
        assert [send(fleet, f"again{number}", [1]) for number in range(4)] == [1, 0, 2, 1]


class TestLeastLoaded:
    def test_waiting_counts_more_than_running(self):
        router = LeastLoaded(LeastLoaded.Options())
        assert router.route(None, [View(0, num_running=7), View(1, num_waiting=2)]) == 0
        assert router.route(None, [View(0, num_running=9), View(1, num_waiting=2)]) == 1
        router = LeastLoaded(LeastLoaded.Options(waiting_weight=1))
        assert router.route(None, [View(0, num_running=7), View(1, num_waiting=2)]) == 1

    def test_equals_take_turns(self):
        router = LeastLoaded(LeastLoaded.Options())
        assert router.route(None, [View(0, last_sent=8), View(1, last_sent=3), View(2, last_sent=5)]) == 1


class TestPrefixAffinity:
    def test_equal_beginnings_stay_together_and_others_are_spread(self):
        fleet = fleet_of(PrefixAffinity)
        first = {name: send(fleet, name, tokens) for name, tokens in PROMPTS.items()}
        assert sorted(first.values()) == [0, 0, 0, 1, 1, 1]
        again = {name: send(fleet, f"{name}2", [*PROMPTS[name], 9, 9]) for name in reversed(PROMPTS)}
        assert again == first

    def test_a_short_shared_beginning_does_not_bind(self):
        """One block of five that all prompts share, such as a chat template's: less than `min_share`."""
        fleet = fleet_of(PrefixAffinity)
        common = [8] * BLOCK_SIZE
        places = [send(fleet, name, [*common, *tokens]) for name, tokens in PROMPTS.items()]
        assert sorted(places) == [0, 0, 0, 1, 1, 1]
        fleet = fleet_of(PrefixAffinity, min_share=0.2)
        assert [send(fleet, name, [*common, *PROMPTS[name]]) for name in "ab"] == [0, 0]

    def test_a_replica_that_is_much_busier_gives_way_and_the_prompt_spreads(self):
        fleet = fleet_of(PrefixAffinity, max_imbalance=8, max_ratio=2)
        places = [send(fleet, str(number), PROMPTS["a"]) for number in range(9)]
        # Load 4 each while they wait. Of replica 0: 4, 8, 12 > 8 + 2 * 0; then the idle one learns the prompt.
        assert places == [0, 0, 0, 1, 1, 1, 0, 1, 0]

    def test_among_replicas_that_know_it_alike_the_least_busy_one(self):
        fleet = fleet_of(PrefixAffinity, max_imbalance=0, max_ratio=1)
        assert [send(fleet, str(number), PROMPTS["a"]) for number in range(4)] == [0, 1, 0, 1]

    def test_the_longest_beginning_wins(self):
        fleet = fleet_of(PrefixAffinity)
        send(fleet, "x", PROMPTS["a"])
        send(fleet, "y", PROMPTS["b"])
        fleet.guard.router.on_routed(fleet_routed([*PROMPTS["a"][: 2 * BLOCK_SIZE]]), View(1))
        assert send(fleet, "z", PROMPTS["a"]) == 0

    def test_another_cache_salt_is_another_prompt(self):
        fleet = fleet_of(PrefixAffinity)
        assert send(fleet, "plain", PROMPTS["a"]) == 0
        assert send(fleet, "salted", PROMPTS["a"], cache_salt="user") == 1
        assert send(fleet, "salted too", PROMPTS["a"], cache_salt="user") == 1

    def test_what_a_lost_replica_knew_is_forgotten(self):
        fleet = fleet_of(PrefixAffinity)
        send(fleet, "x", PROMPTS["a"])
        finish(fleet)
        fleet.clients[0].fall()
        fleet.clients[0].tell()
        fleet.clients[0].come_back()
        send(fleet, "y", PROMPTS["b"])
        assert set(fleet.guard.router._known) == {1}
        assert send(fleet, "z", PROMPTS["b"]) == 1

    def test_emptied_caches_are_forgotten(self):
        fleet = fleet_of(PrefixAffinity)
        send(fleet, "x", PROMPTS["a"])
        finish(fleet)
        fleet.replicas.control("reset_prefix_cache")
        assert fleet.guard.router._known == {}

    def test_the_least_recently_used_is_forgotten_first_and_its_end_before_its_beginning(self):
        fleet = fleet_of(PrefixAffinity, max_blocks=6)
        router = fleet.guard.router
        for name in "ab":
            router.on_routed(fleet_routed(PROMPTS[name]), View(0))
        known = list(router._known[0])
        a, b = (list(fleet_routed(PROMPTS[name]).block_hashes) for name in "ab")
        assert set(known) == {*a[:2], *b}, "four of the newer one, the first two of the older one"

    def test_not_more_is_remembered_than_the_replica_can_hold(self):
        router = PrefixAffinity(PrefixAffinity.Options())
        for name in PROMPTS:
            router.on_routed(fleet_routed(PROMPTS[name]), View(0, num_blocks=10))
        assert len(router._known[0]) == 10

    def test_without_a_prefix_cache_load_decides(self):
        fleet = fleet_of(PrefixAffinity)
        fleet.replicas._block_size = 0
        assert [send(fleet, str(number), PROMPTS["a"]) for number in range(4)] == [0, 1, 0, 1]

    @pytest.mark.parametrize(
        "wrong", [{"min_share": 1.5}, {"max_imbalance": -1}, {"max_ratio": 0.5}, {"max_blocks": 0}]
    )
    def test_options_are_bounded(self, wrong):
        with pytest.raises(ValidationError):
            PrefixAffinity.Options(**wrong)


def fleet_routed(tokens):
    from interlace.engine.routing_books import Routed

    return Routed([fleet_request("any", tokens)], BLOCK_SIZE)

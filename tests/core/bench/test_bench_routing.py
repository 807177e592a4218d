"""`interlace bench router` and `replicas`: what they count and how it is said."""

from __future__ import annotations

import json

import pytest

from interlace import cli
from interlace.bench.replicas import SharedPrefixes
from interlace.bench.routing import NUM_REQUESTS, PROMPT_LENGTHS, measure_routing
from interlace.clock import VirtualClock
from interlace.interfaces.router import Router


class Slow(Router):
    """Takes 10 ms of the clock to choose, and 20 to hear of the end."""

    clock = VirtualClock()

    def route(self, request, replicas):
        self.clock.advance(0.01)
        return replicas[-1].index

    def on_finished(self, request, replica):
        self.clock.advance(0.02)


def test_the_time_of_the_router_is_that_of_all_it_is_asked_and_told():
    costs = measure_routing("slow", lambda: Slow(Router.Options()), 3, 1, Slow.clock)
    assert [cost.prompt_tokens for cost in costs] == list(PROMPT_LENGTHS)
    ended = NUM_REQUESTS - 64  # so many are unfinished at the end
    for cost in costs:
        assert cost.route_us == pytest.approx(1e4 * (1 + 2 * ended / NUM_REQUESTS))
        assert cost.added_us == pytest.approx(cost.route_us), "nothing else takes time on this clock"
        assert cost.routes_per_s == pytest.approx(1e6 / cost.route_us)


def test_the_workload_shares_what_it_says():
    shape = SharedPrefixes(groups=3, per_group=4, prefix_len=10, own_len=5, output_len=2)
    items = shape.items(50_000, seed=1)
    assert items == shape.items(50_000, seed=1) != shape.items(50_000, seed=2)
    beginnings = [tuple(item.prompt_token_ids[:10]) for item in items]
    assert sorted(beginnings.count(one) for one in set(beginnings)) == [4, 4, 4]
    assert len({tuple(item.prompt_token_ids) for item in items}) == 12
    assert {(len(item.prompt_token_ids), item.max_tokens) for item in items} == {(15, 2)}


def test_every_installed_router_is_timed(capsys, monkeypatch):
    monkeypatch.setattr("interlace.bench.routing.NUM_REQUESTS", 100)
    monkeypatch.setattr("interlace.bench.routing.PROMPT_LENGTHS", (64,))
    assert cli.main(["bench", "router", "--repeat", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["router"] for row in rows] == ["least_loaded", "prefix_affinity", "round_robin"]
    assert all(row["routes_per_s"] > 0 for row in rows)


def test_counts_are_checked(capsys):
    assert cli.main(["bench", "replicas", "--per-group", "0"]) == 2
    assert "--per-group must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_routers_are_compared_on_real_replicas(capsys):
    """Affinity finds at least what turns find; here each beginning is computed once instead of once a replica."""
    shape = ["--groups", "6", "--per-group", "4", "--prefix-len", "64", "--own-len", "8", "--output-len", "2"]
    settings = ["--max-model-len", "256", "--cache.memory", "64MiB", "--threads", "2", "--concurrency", "2"]
    command = ["bench", "replicas", "prefix_affinity", "round_robin", *shape, *settings, "--json"]
    assert cli.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    affinity, turns = report["runs"]
    assert (affinity["router"], turns["router"]) == ("prefix_affinity", "round_robin")
    assert (
        affinity["hit_rate"] == pytest.approx(6 * 3 * 64 / (24 * 72), abs=0.1)
        and affinity["hit_rate"] > turns["hit_rate"]
    )
    assert sum(turns["requests_of_replicas"]) == 24 and min(turns["requests_of_replicas"]) == 12

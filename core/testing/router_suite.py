"""`RouterConformance`: what every router must do. No engine, no torch, milliseconds a test.

    class TestMine(RouterConformance):
        router = "mine"                     # the name it is installed under; or the class itself
        options = {"weight": 2}             # as in the configuration

It chooses among replicas that come and go; then it serves in a fleet in which engines die at every moment.
"""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import msgspec
from pydantic import BaseModel, ValidationError

from interlace.engine.routing_books import Routed
from interlace.interfaces.router import Router
from interlace.sampling.params import SamplingParams
from interlace.testing.conformance import Conformance
from interlace.testing.fleet import BLOCK_SIZE, NUM_BLOCKS, fleet_request, random_prompt, run_fleet

MAX_GROWTH = 64 * 1024
"""Bytes a router may hold more after thousands of further requests; noise, and not something for each of them."""


class View(msgspec.Struct, frozen=True):
    """A replica as the contract states it, and nothing else; it cannot be written."""

    index: int
    num_waiting: int = 0
    num_running: int = 0
    kv_usage: float = 0.0
    num_blocks: int = NUM_BLOCKS - 1
    last_sent: int = 0


class Request(NamedTuple):
    """A request as the contract states it."""

    id: str
    prompt_token_ids: tuple[int, ...]
    num_samples: int
    params: SamplingParams
    priority: int
    labels: Mapping[str, str]
    arrival_time: float
    block_hashes: tuple[bytes, ...]


class RouterConformance(Conformance):
    """Subclass it and name the router; see the module."""

    kind = "routers"
    selector = "router"
    router: ClassVar[str | type[Router]]
    spreads: ClassVar[bool] = True
    """Whether many different prompts, all of them unfinished, reach every replica. Say False for a router that means to
    keep requests of one sort together at any price."""

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[Any]]:
        return {"seed": cls.seeds, "count": [2, 3, 7]}

    @classmethod
    def make_router(cls) -> Router:
        """A fresh router with the options of the suite."""
        made: Router = cls.target(cls.target_options)
        return made

    def test_options(self) -> None:
        """Unknown options are refused, defaults are valid."""
        model = self.target.Options
        assert issubclass(model, BaseModel), f"Options is {model!r}, not a pydantic model"
        accepted = True
        try:
            model(**self.options, no_such_option=1)
        except ValidationError:
            accepted = False
        assert not accepted, 'options: an unknown option is accepted; state `model_config = ConfigDict(extra="forbid")`'
        assert self.make_router().options == self.target_options, (
            "self.options is not what the router was given: call super().__init__(options)"
        )

    def test_names_a_replica_it_was_offered(self, seed: int, count: int) -> None:
        """Among replicas of any load, some of them missing; it reads what the contract states, and writes nothing."""
        router, rng = self.make_router(), random.Random(seed)
        for number in range(60):
            views = [_random_view(rng, index, number) for index in range(count)]
            offered = sorted(rng.sample(views, rng.randrange(2, count + 1)), key=lambda view: view.index)
            request = _request(rng, number)
            chosen = _route(router, request, offered)
            assert any(view.index == chosen for view in offered), (
                f"offered: it returned {chosen!r}, the offered replicas have the indices {[v.index for v in offered]}"
            )
            router.on_routed(request, offered[0] if rng.random() < 0.1 else views[chosen])
            if rng.random() < 0.1:
                lost = rng.choice(views)
                router.on_replica_lost(lost)
                router.on_replica_back(lost)
            if rng.random() < 0.02:
                router.on_caches_reset()
            router.on_finished(request, views[chosen])

    def test_many_prompts_reach_every_replica(self, count: int) -> None:
        """Where `spreads` is declared: different prompts, none of which ends, leave no replica without work."""
        if not self.spreads:
            return
        router, rng = self.make_router(), random.Random(1)
        sent: Counter[int] = Counter()
        last = dict.fromkeys(range(count), 0)
        for number in range(1, 60 * count):
            views = [View(i, num_running=sent[i], last_sent=last[i]) for i in range(count)]
            request = _request(rng, number, num_prefixes=10_000)
            chosen = _route(router, request, views)
            router.on_routed(request, views[chosen])
            sent[chosen] += 1
            last[chosen] = number
        idle = [index for index in range(count) if not sent[index]]
        assert not idle, f"spread: replicas {idle} of {count} got nothing, the others {dict(sent)}; see `spreads`"

    def test_memory_is_bounded(self) -> None:
        """Thousands of finished requests leave no trace."""
        router, rng = self.make_router(), random.Random(2)
        views = [View(0), View(1)]

        def serve(numbers: range) -> None:
            for number in numbers:
                request = _request(rng, number, num_prefixes=10_000)
                chosen = _route(router, request, views)
                router.on_routed(request, views[chosen])
                router.on_finished(request, views[chosen])

        serve(range(1500))
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            serve(range(1500, 4500))
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert grown < MAX_GROWTH, f"memory: {grown:,} bytes more after 3,000 more requests, all of them finished"

    def test_in_a_fleet(self, seed: int) -> None:
        """A random history with deaths and aborts: every request ends once, and the core never had to step in."""
        fleet = run_fleet(self.make_router(), seed)
        assert fleet.guard.degraded is None, f"raises nothing: {fleet.guard.degraded} (history {seed})"


def _route(router: Router, request: Request, views: Sequence[View]) -> int:
    try:
        return router.route(request, tuple(views))
    except AttributeError as error:
        raise AssertionError(f"contract: route reads or writes what is not stated: {error}") from error
    except Exception as error:
        raise AssertionError(f"raises nothing: route raised {type(error).__name__}: {error}") from error


def _random_view(rng: random.Random, index: int, number: int) -> View:
    waiting, running = rng.choice((0, 0, rng.randrange(100))), rng.choice((0, rng.randrange(256)))
    return View(index, waiting, running, rng.random(), last_sent=rng.randrange(number + 1))


def _request(rng: random.Random, number: int, num_prefixes: int = 4) -> Request:
    prompt = random_prompt(rng, num_prefixes)
    sample = fleet_request(f"r{number}", prompt)
    caching = num_prefixes > 4 or rng.random() < 0.9
    return Request(
        id=sample.id,
        prompt_token_ids=tuple(prompt),
        num_samples=rng.choice((1, 1, 4)),
        params=sample.params,
        priority=rng.choice((0, 0, -5, 5)),
        labels=MappingProxyType(rng.choice(({}, {"tenant": "a"}))),
        arrival_time=float(number),
        block_hashes=tuple(Routed([sample], BLOCK_SIZE if caching else 0).block_hashes),
    )

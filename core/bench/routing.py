"""What routing costs: a router alone, and all that replicas add to the way of a request, with engines that take no
time."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec

from interlace.clock import Clock, MonotonicClock
from interlace.engine.client import EngineClient, EngineHealth, OnDeath, OnEvent, OnOutput
from interlace.engine.guarded_router import GuardedRouter
from interlace.engine.replicas import Replicas
from interlace.interfaces.executor import ExecutorInfo
from interlace.interfaces.router import Router
from interlace.kv.specs import KVCacheConfig
from interlace.messages import EngineRequest, FinishInfo, SamplingParams, StepOutput

BLOCK_SIZE = 32
NUM_BLOCKS = 4096
PROMPT_LENGTHS = (64, 512, 4096)
NUM_REQUESTS = 1000
IN_FLIGHT = 64
"""Requests that are unfinished at any time."""
NUM_PREFIXES = 50
"""Different first halves of prompts."""


class RoutingCost(msgspec.Struct, frozen=True, kw_only=True):
    """Of one router, for prompts of one length."""

    router: str
    prompt_tokens: int
    route_us: float
    """Microseconds a request in the router itself: its choice and all that it is told."""
    routes_per_s: float
    """What one thread could route at most."""
    added_us: float
    """Microseconds a request that replicas add in all: routing, books, hand-over, and what is told of its end."""


class _Nowhere(EngineClient):
    """Takes requests and does nothing with them."""

    def start(self, on_output: OnOutput, on_death: OnDeath, on_event: OnEvent | None = None) -> ExecutorInfo:
        self.say = on_output
        kv = KVCacheConfig(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS + 1, groups=(), bytes_per_block=1)
        return ExecutorInfo(kv=kv)

    def add(self, requests: list[EngineRequest]) -> None:
        self.newest = requests

    def abort(self, request_ids: list[str]) -> None:
        """There is nothing to end."""

    def health(self, timeout: float = 5.0) -> EngineHealth:
        return EngineHealth(status="ok")

    def control(self, operation: str, **arguments: object) -> None:
        """There is nothing to run it in."""

    def shutdown(self) -> None:
        """There is nothing to stop."""


def measure_routing(
    name: str, make: Callable[[], Router], num_replicas: int, repeat: int, clock: Clock | None = None
) -> list[RoutingCost]:
    """One entry per prompt length, the best of `repeat` runs of each: noise only adds."""
    clock = clock or MonotonicClock()
    costs = []
    for length in PROMPT_LENGTHS:
        requests = _requests(length)
        runs = [_run(name, make(), num_replicas, requests, clock) for _ in range(repeat)]
        alone = min(seconds for _, seconds in runs) / len(requests)
        added = min(seconds for seconds, _ in runs) / len(requests)
        costs.append(
            RoutingCost(
                router=name,
                prompt_tokens=length,
                route_us=1e6 * alone,
                routes_per_s=1 / alone if alone else float("inf"),
                added_us=1e6 * added,
            )
        )
    return costs


def _requests(length: int) -> list[EngineRequest]:
    draw = random.Random(length)
    prefixes = [draw.choices(range(1000), k=length // 2) for _ in range(NUM_PREFIXES)]
    return [
        EngineRequest(
            id=str(number),
            prompt_token_ids=draw.choice(prefixes) + draw.choices(range(1000), k=length - length // 2),
            params=SamplingParams(),
            arrival_time=0.0,
            seed=0,
        )
        for number in range(NUM_REQUESTS)
    ]


def _run(
    name: str, router: Router, num_replicas: int, requests: list[EngineRequest], clock: Clock
) -> tuple[float, float]:
    """(seconds that replicas took over a single client in all, those of them in the router)."""
    clients = [_Nowhere() for _ in range(num_replicas)]
    guard = GuardedRouter(router, name, clock.now)
    replicas = Replicas(clients, guard, BLOCK_SIZE)
    replicas.start(_ignore, _ignore)
    single = _Nowhere()
    single.start(_ignore, _ignore)
    owners: list[_Nowhere] = []
    total = alone = 0.0
    for number, request in enumerate(requests):
        for client in clients:
            client.newest = []
        began = clock.now()
        replicas.add([request])
        total += clock.now() - began
        owners.append(next(client for client in clients if client.newest))
        if number >= IN_FLIGHT:
            old = number - IN_FLIGHT
            output = _ending(requests[old].id)
            began = clock.now()
            owners[old].say(output)
            total += clock.now() - began
        began = clock.now()
        single.add([request])
        if number >= IN_FLIGHT:
            single.say(output)
        alone += clock.now() - began
    replicas.shutdown()
    return total - alone, guard.take_seconds()


def _ending(request_id: str) -> StepOutput:
    return StepOutput(
        step_id=0,
        now=0.0,
        request_ids=[request_id],
        counts=[1],
        token_ids=[1],
        first_scheduled={request_id: 0.0},
        finished={request_id: FinishInfo(reason="length")},
    )


def _ignore(said: object) -> None:
    pass

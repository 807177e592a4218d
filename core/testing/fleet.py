"""`Fleet`: replicas behind a router, without processes, threads or waiting. The test decides when each of them steps,
breaks, is found dead, and comes back; the fleet checks that every request ends once, whatever happens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from interlace.clock import Clock
from interlace.engine.client import EngineClient, EngineHealth, OnDeath, OnEvent, OnOutput
from interlace.engine.guarded_router import GuardedRouter
from interlace.engine.replicas import Replicas
from interlace.errors import EngineDeadError, EngineRestartingError
from interlace.interfaces.executor import ExecutorInfo
from interlace.interfaces.router import Router
from interlace.kv.specs import KVCacheConfig
from interlace.messages import EngineRequest, FinishInfo, StepOutput, StepStats
from interlace.sampling.params import SamplingParams

BLOCK_SIZE = 4
NUM_BLOCKS = 65
SEATS = 4


class MortalClient(EngineClient):
    """An engine that makes a token per running request and step, and dies when told to."""

    def __init__(self) -> None:
        self.waiting: dict[str, EngineRequest] = {}
        self.running: dict[str, tuple[EngineRequest, int]] = {}
        """Engine request id → the request, and how many tokens it has."""
        self.added: list[EngineRequest] = []
        self.operations: list[str] = []
        self.dead: EngineDeadError | None = None
        self.closed = False
        self._ended: dict[str, FinishInfo] = {}
        self._steps = 0

    def start(self, on_output: OnOutput, on_death: OnDeath, on_event: OnEvent | None = None) -> ExecutorInfo:
        self._on_output, self._on_death = on_output, on_death
        return self._info()

    def _info(self) -> ExecutorInfo:
        return ExecutorInfo(
            kv=KVCacheConfig(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, groups=(), bytes_per_block=1)
        )

    def _check(self) -> None:
        if self.dead is not None:
            raise self.dead

    def add(self, requests: list[EngineRequest]) -> None:
        self._check()
        for request in requests:
            self.waiting[request.id] = request
        self.added += requests

    def abort(self, request_ids: list[str]) -> None:
        self._check()
        for request_id in request_ids:
            if self.waiting.pop(request_id, None) or self.running.pop(request_id, None):
                self._ended[request_id] = FinishInfo(reason="abort")

    def health(self, timeout: float = 5.0) -> EngineHealth:
        self._check()
        return EngineHealth(
            status="ok", num_running=len(self.running), num_waiting=len(self.waiting), steps=self._steps
        )

    def control(self, operation: str, **arguments: Any) -> Any:
        self._check()
        self.operations.append(operation)
        return operation

    def shutdown(self) -> None:
        self.closed = True

    # ── What the test does ────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> None:
        """Admit what finds a seat, make a token for each, end those that have all."""
        first = list(self.waiting)[: SEATS - len(self.running)]
        for request_id in first:
            self.running[request_id] = (self.waiting.pop(request_id), 0)
        ids = list(self.running)
        for request_id in ids:
            request, count = self.running[request_id]
            self.running[request_id] = (request, count + 1)
            if count + 1 >= (request.params.max_tokens or 1):
                del self.running[request_id]
                self._ended[request_id] = FinishInfo(reason="length")
        finished, self._ended = self._ended, {}
        self._steps += 1
        self._on_output(
            StepOutput(
                step_id=self._steps,
                now=float(self._steps),
                request_ids=ids,
                counts=[1] * len(ids),
                token_ids=[7] * len(ids),
                finished=finished,
                first_scheduled=dict.fromkeys(first, 0.0),
                stats=self._stats(len(ids)),
            )
        )

    def _stats(self, count: int) -> StepStats:
        return StepStats(
            step_id=self._steps,
            now=float(self._steps),
            duration=0.0,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_scheduled_requests=count,
            num_scheduled_tokens=count,
            num_prefill_tokens=0,
            num_sampled_tokens=count,
            num_preemptions=0,
            kv_usage=len(self.running) / SEATS,
            prefix_queries=0,
            prefix_hits=0,
        )

    def fall(self, *, for_good: bool = False) -> None:
        """It is dead, but its client's thread has not told so yet."""
        self.dead = EngineDeadError("it fell") if for_good else EngineRestartingError("it fell, a new one starts", 2.0)
        self.waiting, self.running, self._ended = {}, {}, {}

    def tell(self) -> None:
        """Its client's thread tells of the death."""
        assert self.dead is not None, "tell() before fall()"
        self._on_death(self.dead)

    def come_back(self) -> None:
        """A new engine has taken its place."""
        assert self.on_restart is not None, "come_back() outside a fleet"
        self.dead = None
        self.on_restart(self._info())


class Fleet:
    """A started `Replicas` over `MortalClient`s, and what became of every request."""

    def __init__(self, router: Router, count: int = 3, name: str = "tested", clock: Clock | None = None) -> None:
        """With a `clock` the router is watched."""
        self.clients = [MortalClient() for _ in range(count)]
        self.guard = GuardedRouter(router, name, float)
        self.replicas = Replicas(self.clients, self.guard, BLOCK_SIZE, clock=clock)
        self.outcomes: dict[str, list[str]] = {}
        """Engine request id → finish reasons, or `lost`; one entry for each time its end was told."""
        self.outputs: list[StepOutput] = []
        self.losses: list[tuple[EngineDeadError, list[str], int]] = []
        self.deaths: list[EngineDeadError] = []
        self.replicas.on_loss = self._lost
        self.replicas.on_restart = lambda info: None
        self.replicas.start(self._said, self.deaths.append)

    def _said(self, output: StepOutput) -> None:
        self.outputs.append(output)
        for request_id, info in output.finished.items():
            self.outcomes[request_id].append(info.reason)

    def _lost(self, error: EngineDeadError, ids: list[str], index: int) -> None:
        self.losses.append((error, ids, index))
        for request_id in ids:
            self.outcomes[request_id].append("lost")

    def add(self, *requests: EngineRequest) -> None:
        """Hand them in, together. Raises what the client raises; then none of them counts."""
        for request in requests:
            self.outcomes[request.id] = []
        try:
            self.replicas.add(list(requests))
        except EngineDeadError:
            for request in requests:
                del self.outcomes[request.id]
            raise

    def where(self, request_id: str) -> int:
        """Index of the replica that has it."""
        (index,) = [i for i, one in enumerate(self.clients) if request_id in one.waiting or request_id in one.running]
        return index

    def check(self) -> None:
        """Raise `AssertionError` unless each unfinished request is in one engine, and ended ones in none."""
        held: dict[str, int] = {}
        for client in self.clients:
            for request_id in (*client.waiting, *client.running, *client._ended):
                held[request_id] = held.get(request_id, 0) + 1
        fallen = [index for index, client in enumerate(self.clients) if client.dead is not None]
        for request_id, told in self.outcomes.items():
            assert len(told) <= 1, f"{request_id} ended {len(told)} times: {told}"
            assert held.get(request_id, 0) <= 1, f"{request_id} is in several engines"
            if not fallen:
                assert len(told) + held.get(request_id, 0) == 1, f"{request_id} is lost"
            elif told:
                assert request_id not in held, f"{request_id} ended ({told[0]}) and still runs"

    def settle(self) -> None:
        """Bring everything back and run until nothing is left; then every request has ended, once."""
        for client in self.clients:
            if client.dead is not None:
                client.tell()
                client.come_back()
        while any(client.waiting or client.running or client._ended for client in self.clients):
            for client in self.clients:
                client.step()
        self.check()
        unended = [request_id for request_id, told in self.outcomes.items() if len(told) != 1]
        assert not unended, f"never ended: {unended}"


def fleet_request(
    id: str,
    tokens: Iterable[int] = (1, 2, 3),
    max_tokens: int = 3,
    group: str | None = None,
    index: int = 0,
    **more: Any,
) -> EngineRequest:
    """One sample as the front makes it."""
    return EngineRequest(
        id=id,
        prompt_token_ids=list(tokens),
        params=SamplingParams(max_tokens=max_tokens),
        arrival_time=0.0,
        seed=0,
        sample_index=index,
        group=group,
        **more,
    )


def random_prompt(rng: random.Random, num_prefixes: int = 4) -> list[int]:
    """One of a few beginnings, then tokens of its own."""
    prefix = [rng.randrange(num_prefixes)] * (BLOCK_SIZE * rng.randrange(6))
    return [*prefix, *(rng.randrange(9) for _ in range(rng.randrange(1, 30)))]


def run_fleet(router: Router, seed: int, count: int = 3, actions: int = 300) -> Fleet:
    """A random history: requests of several samples, steps, aborts, deaths that are found out late, returns. Everything
    is checked after each action, and at the end every request has ended once."""
    rng = random.Random(seed)
    fleet = Fleet(router, count)
    for number in range(actions):
        client = rng.choice(fleet.clients)
        match rng.choices(("add", "step", "abort", "fall", "tell", "reset"), (40, 40, 6, 3, 6, 1))[0]:
            case "add":
                _add(fleet, rng, number)
            case "step" if client.dead is None:
                client.step()
            case "abort":
                fleet.replicas.abort(_some(rng, list(fleet.outcomes)))
            case "fall" if client.dead is None:
                client.fall()
            case "tell" if client.dead is not None:
                client.tell()
                client.come_back()
            case "reset" if any(one.dead is None for one in fleet.clients):
                fleet.replicas.control("reset_prefix_cache")
        fleet.check()
    fleet.settle()
    return fleet


def _add(fleet: Fleet, rng: random.Random, number: int) -> None:
    requests: list[EngineRequest] = []
    for user in range(rng.randrange(1, 4)):
        name, prompt, samples = f"{number}.{user}", random_prompt(rng), rng.choice((1, 1, 3))
        group = name if samples > 1 else None
        requests += [
            fleet_request(
                f"{name}.{i}", prompt, rng.randrange(1, 6), group, i, labels=rng.choice(({}, {"tenant": "a"}))
            )
            for i in range(samples)
        ]
    try:
        fleet.add(*requests)
    except EngineDeadError:
        assert all(client.dead is not None for client in fleet.clients), "refused although a replica works"
        return
    for group in {request.group for request in requests} - {None}:
        places = {i for i, one in enumerate(fleet.clients) for r in one.added if r.group == group}
        assert len(places) == 1, f"samples of {group} are in several replicas: {places}"


def _some(rng: random.Random, ids: Sequence[str]) -> list[str]:
    return [*rng.sample(ids, min(len(ids), 2)), "nobody"]

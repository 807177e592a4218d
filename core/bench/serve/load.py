"""One run: requests sent when they are due, under a limit on how many are under way."""

from __future__ import annotations

import asyncio
import collections
import math
import resource
from collections.abc import Sequence

import msgspec

from interlace.bench.serve.client import Client, Exchange
from interlace.bench.serve.target import Target, open_session
from interlace.bench.serve.workloads import ServeItem
from interlace.clock import Clock


class LoadRun(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one run."""

    started: float
    """Clock seconds; the arrival times count from here."""
    exchanges: list[Exchange]
    """In the order of the workload."""
    cpu_s: float
    """Processor time of this client during the run."""

    @property
    def ended(self) -> float:
        """When the last request was done."""
        return max(exchange.ended for exchange in self.exchanges)

    @property
    def duration_s(self) -> float:
        """From the start to the end of the last request."""
        return self.ended - self.started


class Watcher:
    """Counts what happens, for whoever shows it while it runs."""

    def __init__(self) -> None:
        self.total = 0
        self.sent = 0
        self.done = 0
        self.failed = 0
        self.started = 0.0
        self._client: Client | None = None

    @property
    def tokens(self) -> int:
        """Output tokens so far."""
        return 0 if self._client is None else self._client.tokens_seen

    def begin(self, total: int, started: float, client: Client) -> None:
        """A run begins."""
        self.total, self.started, self._client = total, started, client
        self.sent = self.done = self.failed = 0

    def finished(self, exchange: Exchange) -> None:
        """A request ended."""
        self.done += 1
        self.failed += exchange.error is not None


async def run_load(
    target: Target,
    items: Sequence[ServeItem],
    times: Sequence[float],
    clock: Clock,
    *,
    max_concurrency: int | None = None,
    watcher: Watcher | None = None,
) -> LoadRun:
    """Send `items` at `times` (seconds from now, never decreasing), at most `max_concurrency` at once."""
    bodies = [target.body(item) for item in items]  # before the clock starts: encoding is none of the server's time
    watcher = watcher or Watcher()
    room = None if max_concurrency is None else _Room(max_concurrency)
    exchanges: list[Exchange] = []
    async with open_session() as session, asyncio.TaskGroup() as tasks:
        client = target.client(session, clock)
        used = _cpu_seconds()
        started = clock.now()
        watcher.begin(len(items), started, client)
        for index, (item, body, time) in enumerate(zip(items, bodies, times, strict=True)):
            due = started + time
            while (wait := due - clock.now()) > 0:
                await asyncio.sleep(wait)
            ready = due if room is None else max(due, await room.take())
            exchange = Exchange(index=index, asked_tokens=item.max_tokens, due=due, ready=ready)
            exchanges.append(exchange)
            watcher.sent += 1
            tasks.create_task(_one(client, body, exchange, room, watcher))
    return LoadRun(started=started, exchanges=exchanges, cpu_s=_cpu_seconds() - used)


async def _one(client: Client, body: bytes, exchange: Exchange, room: _Room | None, watcher: Watcher) -> None:
    await client.send(body, exchange)
    if room is not None:
        room.give(exchange.ended)
    watcher.finished(exchange)


class _Room:
    """Places for requests under way, each with the time since when it is free. One task takes, others give."""

    def __init__(self, places: int) -> None:
        self._free = collections.deque([-math.inf] * places)
        self._given = asyncio.Event()

    async def take(self) -> float:
        """The place that has been free longest; waits for one."""
        while not self._free:
            self._given.clear()
            await self._given.wait()
        return self._free.popleft()

    def give(self, now: float) -> None:
        self._free.append(now)
        self._given.set()


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

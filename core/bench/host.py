"""What the engine itself costs: steps and admissions with an executor that takes no time."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from interlace.clock import Clock, MonotonicClock
from interlace.interfaces.scheduler import Scheduler
from interlace.testing.overhead import BATCHES, added_seconds, step_seconds


class HostStep(msgspec.Struct, frozen=True, kw_only=True):
    """A decode step of so many requests: plan and update."""

    requests: int
    groups: str
    microseconds: float


class HostAdd(msgspec.Struct, frozen=True, kw_only=True):
    """A thousand requests of 1,024 tokens, prefix caching on."""

    shared_tokens: int
    add_ms: float
    """Taking them in."""
    hash_ms: float
    """Hashing their blocks."""
    admit_ms: float
    """Looking up, allocating and running the steps that admit them."""


class HostReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `interlace bench host`."""

    scheduler: str
    steps: list[HostStep]
    added: list[HostAdd]


_GROUPS = {"full attention": (0,), "1 full and 5 window groups": (0, 512, 512, 512, 512, 512)}


def measure_host(
    name: str, make_scheduler: Callable[[], Scheduler], repeat: int, clock: Clock | None = None
) -> HostReport:
    """The best of `repeat` runs of each: noise only adds."""
    clock = clock or MonotonicClock()
    steps = [
        HostStep(
            requests=batch,
            groups=groups,
            microseconds=1e6 * min(step_seconds(make_scheduler, batch, clock, windows=windows) for _ in range(repeat)),
        )
        for groups, windows in _GROUPS.items()
        for batch in BATCHES
    ]
    added = []
    for shared in (0, 512):
        runs = [added_seconds(make_scheduler, clock, shared=shared) for _ in range(repeat)]
        add, hashing, admit = (1e3 * min(times) for times in zip(*runs, strict=True))
        added.append(HostAdd(shared_tokens=shared, add_ms=add, hash_ms=hashing, admit_ms=admit))
    return HostReport(scheduler=name, steps=steps, added=added)

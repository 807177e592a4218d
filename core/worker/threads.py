"""How many threads to compute with."""

from __future__ import annotations

import math
import os
from pathlib import Path

import msgspec

from interlace.worker.control_group import cpu_quota

_TOPOLOGY = Path("/sys/devices/system/cpu")


class ThreadPlan(msgspec.Struct, frozen=True):
    """A number of threads and what it comes from."""

    count: int
    reason: str
    is_crowded: bool = False
    """Whether they are more than can run at once: every step then waits for those that have no core."""


def plan_threads(threads: int) -> ThreadPlan:
    """The `threads` setting, settled; 0 stands for one thread per core this process may use."""
    fitting = default_threads(_allowed(), cpu_quota())
    if not threads:
        return fitting
    too_many = f"; only {fitting.count} can run at once ({fitting.reason})" if threads > fitting.count else ""
    return ThreadPlan(threads, f"threads{too_many}", bool(too_many))


def bind(cores: tuple[int, ...]) -> None:
    """Keep this process to some processors; empty: leave it as it is. Threads that there are already are not moved, so
    this comes before torch makes its own."""
    if cores:
        os.sched_setaffinity(0, cores)


def default_threads(allowed: set[int], quota: float | None, topology: Path = _TOPOLOGY) -> ThreadPlan:
    """One thread per core among the `allowed` processors, at most the CPU quota.

    Two threads that share a core would also share its arithmetic units, and all threads of a step wait for the
    slowest. For the same reason a quota is not exceeded by more than half a core: the kernel would stop all threads
    for the rest of each period."""
    cores = len({_core(number, topology) for number in allowed}) or 1
    most = cores if quota is None else max(1, math.ceil(quota - 0.5))
    if most < cores:
        return ThreadPlan(most, f"CPU quota of {quota:.3g} of {cores} cores")
    return ThreadPlan(cores, "one per core this process may use")


def _core(processor: int, topology: Path) -> str:
    """A name of the core that `processor` belongs to: the list of its hardware threads."""
    try:
        return (topology / f"cpu{processor}" / "topology" / "thread_siblings_list").read_text("ascii").strip()
    except OSError:
        return str(processor)


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))

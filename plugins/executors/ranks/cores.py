"""Which processors a rank is bound to."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

from interlace.errors import ConfigError

_TOPOLOGY = Path("/sys/devices/system/cpu")


def parse_cores(text: str, allowed: set[int] | None = None) -> tuple[int, ...]:
    """`0-3,8` → (0, 1, 2, 3, 8). `allowed`: processors this process may use, by default as the system says.

    Raises `ConfigError` for anything else, and for processors that are not allowed."""
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ConfigError(f"executor option cores: '{text}' is no list of processors; write it like `0-3,8`")
        found.update(range(int(first), int(last) + 1))
    if foreign := sorted(found - allowed):
        raise ConfigError(
            f"executor option cores: '{text}' names processor {foreign[0]}, which this process may not use; "
            f"allowed are {', '.join(map(str, sorted(allowed)))}"
        )
    return tuple(sorted(found))


def deal_cores(
    num_ranks: int, allowed: set[int] | None = None, topology: Path = _TOPOLOGY, *, num_replicas: int = 1
) -> list[tuple[int, ...]]:
    """The allowed processors, dealt to ranks core by core: neighbours stay together, hardware threads of a core are not
    separated. Raises `ConfigError` if there are fewer cores than ranks, which are those of `num_replicas` engines."""
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    cores: dict[str, list[int]] = {}
    for processor in sorted(allowed):
        cores.setdefault(_core(processor, topology), []).append(processor)
    if len(cores) < num_ranks:
        raise ConfigError(
            f"executor option cores = ['auto'] needs a core for each of {num_ranks} ranks"
            f"{f' (of engine.replicas = {num_replicas})' if num_replicas > 1 else ''}; this process may use "
            f"{len(cores)}. Use fewer ranks, or leave cores empty"
        )
    groups = list(cores.values())
    bounds = [rank * len(groups) // num_ranks for rank in range(num_ranks + 1)]
    return [
        tuple(sorted(processor for group in groups[start:end] for processor in group))
        for start, end in pairwise(bounds)
    ]


def _core(processor: int, topology: Path) -> str:
    """A name of the core that `processor` belongs to: the list of its hardware threads."""
    try:
        return (topology / f"cpu{processor}" / "topology" / "thread_siblings_list").read_text("ascii").strip()
    except OSError:
        return str(processor)

"""`EngineSnapshot`: the inside of an engine on demand, for people who look at it and for the log when it hangs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from interlace.engine.core import EngineCore
from interlace.request import RequestState
from interlace.scheduling.queues import Queues

MAX_REQUESTS = 256
MAX_BLOCKS = 16384


class RequestSnapshot(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One unfinished request, as of `EngineSnapshot`."""

    id: str
    num_prompt_tokens: int
    num_computed_tokens: int
    """Tokens whose KV is in the cache, or will be after the steps under way."""
    num_output_tokens: int
    max_tokens: int
    age: float
    """Seconds since its arrival."""
    priority: int = 0
    num_preemptions: int = 0
    blocked_on: tuple[str, ...] = ()
    engine: int = 0
    """Which replica has it."""


class ReplicaSnapshot(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One of several replicas in an `EngineSnapshot` of all."""

    engine: int
    """Its index."""
    works: bool
    """False: it gave no answer, because it is dead or being started again."""
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    steps: int = 0


class EngineSnapshot(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The inside of an engine between two steps; made only when asked for (`Front.snapshot`)."""

    now: float
    steps: int
    """Steps completed since the engine started."""
    num_in_flight: int
    """Steps under way."""
    num_running: int
    num_waiting: int
    """Without a seat, blocked ones included."""
    num_blocked: int
    num_preempted: int
    """Waiting requests that were running before."""
    running: list[RequestSnapshot]
    """In order of admission; at most as many as were asked for."""
    waiting: list[RequestSnapshot]
    """In the policy's order, then the blocked ones; at most as many as were asked for."""
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    """Tokens per KV block."""
    num_blocks: int
    """Blocks that requests can hold; the null block is not among them."""
    num_free_blocks: int
    """Held by no request, cached ones included."""
    num_cached_blocks: int
    """Whose content the prefix cache can find, held or not."""
    kv_usage: float
    """Share of blocks held, 0 to 1."""
    blocks: bytes
    """The KV block map, one byte per block in order of id: 0 free, 1 cached (free, but its content can still be
    found), 2 active (held by one request), 3 shared (by several)."""
    blocks_stride: int
    """1; where there are more blocks than were asked for, the map shows every `blocks_stride`-th."""
    prefix_queries: int
    prefix_hits: int
    """As in `StepStats`."""
    degraded: str | None = None
    plugins: dict[str, list[str]] = {}
    """Kind → names of the plugins in force; filled in by the front."""
    replicas: tuple[ReplicaSnapshot, ...] = ()
    """By index, where there are several; what stands above is then about all of them together."""


def take_snapshot(
    core: EngineCore, now: float, steps: int, max_requests: int = MAX_REQUESTS, max_blocks: int = MAX_BLOCKS
) -> EngineSnapshot:
    """The state of `core` between two steps: at most `max_requests` running and as many waiting requests, and at most
    `max_blocks` blocks of the map. Takes time in proportion to these limits, plus a look at each unfinished request."""
    queues, pool, limits = core.queues, core.kv.pool, core.limits
    running, waiting = list(queues.running), _waiting(queues)
    stride = max(1, -(-pool.num_usable // max(1, max_blocks)))
    return EngineSnapshot(
        now=now,
        steps=steps,
        num_in_flight=core.num_in_flight,
        num_running=len(running),
        num_waiting=len(waiting),
        num_blocked=len(queues.blocked),
        num_preempted=sum(state.num_preemptions > 0 for state in waiting),
        running=[_request(state, now) for state in running[:max_requests]],
        waiting=[_request(state, now) for state in waiting[:max_requests]],
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=core.max_model_len,
        block_size=core.kv.block_size,
        num_blocks=pool.num_usable,
        num_free_blocks=pool.num_free,
        num_cached_blocks=pool.num_cached,
        kv_usage=core.kv.usage,
        blocks=pool.block_map(stride),
        blocks_stride=stride,
        prefix_queries=core.prefix_queries,
        prefix_hits=core.prefix_hits,
        degraded=core.degraded,
    )


def merge_snapshots(parts: Sequence[EngineSnapshot | None], max_requests: int = MAX_REQUESTS) -> EngineSnapshot:
    """One snapshot of all replicas, by index; None stands for one that gave no answer, and there is another one.

    Numbers are added up, block maps stand one behind the other; the oldest request is the first that is listed."""
    found = {index: part for index, part in enumerate(parts) if part is not None}
    first, *_ = found.values()
    stride = max(part.blocks_stride for part in found.values())
    num_blocks = sum(part.num_blocks for part in found.values())
    num_free = sum(part.num_free_blocks for part in found.values())
    reasons = [f"replica {index}: {part.degraded}" for index, part in found.items() if part.degraded is not None]
    reasons += [f"replica {index} is not running" for index, part in enumerate(parts) if part is None]
    sums = {name: sum(getattr(part, name) for part in found.values()) for name in _SUMMED}
    return msgspec.structs.replace(
        first,
        **sums,
        now=max(part.now for part in found.values()),
        running=_merge(found, "running", max_requests),
        waiting=_merge(found, "waiting", max_requests),
        num_blocks=num_blocks,
        num_free_blocks=num_free,
        kv_usage=1.0 - num_free / num_blocks,
        blocks=b"".join(_resample(part, stride) for part in found.values()),
        blocks_stride=stride,
        degraded="; ".join(reasons) or None,
        replicas=tuple(_replica(index, part) for index, part in enumerate(parts)),
    )


_SUMMED = (
    "steps",
    "num_in_flight",
    "num_running",
    "num_waiting",
    "num_blocked",
    "num_preempted",
    "max_num_seqs",
    "num_cached_blocks",
    "prefix_queries",
    "prefix_hits",
)


def _resample(part: EngineSnapshot, stride: int) -> bytes:
    """Its block map with a larger stride: a replica that was started again may have another number of blocks."""
    return bytes(part.blocks[block // part.blocks_stride] for block in range(0, part.num_blocks, stride))


def _merge(found: Mapping[int, EngineSnapshot], which: str, most: int) -> list[RequestSnapshot]:
    requests = [
        msgspec.structs.replace(request, engine=index)
        for index, part in found.items()
        for request in getattr(part, which)
    ]
    return sorted(requests, key=lambda request: -request.age)[:most]


def _replica(index: int, part: EngineSnapshot | None) -> ReplicaSnapshot:
    if part is None:
        return ReplicaSnapshot(engine=index, works=False)
    return ReplicaSnapshot(
        engine=index,
        works=True,
        num_running=part.num_running,
        num_waiting=part.num_waiting,
        kv_usage=part.kv_usage,
        prefix_queries=part.prefix_queries,
        prefix_hits=part.prefix_hits,
        steps=part.steps,
    )


def _waiting(queues: Queues) -> list[RequestState]:
    return [*queues.waiting.snapshot(), *queues.blocked.values()]


def _request(state: RequestState, now: float) -> RequestSnapshot:
    return RequestSnapshot(
        id=state.id,
        num_prompt_tokens=state.num_prompt_tokens,
        num_computed_tokens=state.num_planned,
        num_output_tokens=state.num_known - state.num_prompt_tokens,
        max_tokens=state.max_tokens,
        age=now - state.arrival_time,
        priority=state.priority,
        num_preemptions=state.num_preemptions,
        blocked_on=tuple(sorted(state.blocked_on)),
    )


def describe_state(core: EngineCore, now: float, steps: int, max_requests: int = 32) -> str:
    """The same for people, in a few lines. Meant for an engine that is stuck, so another thread may be at its state:
    what cannot be read because of that is said, and nothing is raised."""
    try:
        found = take_snapshot(core, now, steps, max_requests, max_blocks=1)
        plans = core.plans_in_flight
    except Exception as error:
        return f"the scheduler's state cannot be read: {type(error).__name__}: {error}"
    lines = [f"{steps} steps completed, {found.num_in_flight} under way"]
    lines += [
        f"  step {plan.step_id}: {len(plan.slots)} rows, {sum(plan.num_tokens)} tokens, {len(plan.admitted)} admitted, "
        f"{len(plan.preempted)} preempted"
        for plan in plans
    ]
    held = found.num_blocks - found.num_free_blocks
    lines.append(f"KV cache: {held} of {found.num_blocks} blocks held, {found.num_cached_blocks} cached")
    for title, total, requests in (
        ("running", found.num_running, found.running),
        ("waiting", found.num_waiting, found.waiting),
    ):
        lines.append(f"{title}: {total}")
        lines += [_line(request) for request in requests]
        if total > len(requests):
            lines.append(f"  and {total - len(requests)} more")
    return "\n".join(lines)


def _line(request: RequestSnapshot) -> str:
    return (
        f"  {request.id}: prompt {request.num_prompt_tokens}, computed {request.num_computed_tokens}, output "
        f"{request.num_output_tokens} of {request.max_tokens} tokens, {request.age:.1f} s old"
    )

"""What the engine itself costs, without a model: `python -m interlace.testing.overhead [--scheduler NAME]`.

Plans and updates are timed with results that cost nothing: the time the engine adds to every step of decoding, and what
it takes to add a thousand long requests and to admit them with prefix caching. The best of several runs counts, since
noise only adds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

from interlace.clock import Clock, MonotonicClock
from interlace.engine.core import EngineCore
from interlace.interfaces.executor import ExecutorInfo
from interlace.interfaces.scheduler import Scheduler
from interlace.kv.specs import KVCacheConfig, KVGroup
from interlace.messages import EngineRequest, SamplingParams, StepPlan, StepResult
from interlace.spec import SchedulerLimits
from interlace.testing.conformance import find_provider

MakeScheduler = Callable[[], Scheduler]
BATCHES = (1, 16, 64, 256)
BLOCK_SIZE = 32


class Added(NamedTuple):
    """What a thousand requests cost, in seconds."""

    add: float
    """Taking them in."""
    hash: float
    """Hashing their blocks for the prefix cache."""
    admit: float
    """Looking up, allocating, planning and updating the steps that admit them."""


def null_result(plan: StepPlan) -> StepResult:
    """A result with the same token for every row that samples."""
    counts = [int(samples) for samples in plan.sample]
    return StepResult(step_id=plan.step_id, counts=counts, token_ids=[1] * sum(counts), duration=0.0)


def make_core(make_scheduler: MakeScheduler, num_blocks: int = 40_000, windows: Sequence[int] = (0,)) -> EngineCore:
    """An engine core with room for everything; one KV group per entry of `windows`."""
    groups = tuple(KVGroup("window" if window else "full", window, (i,)) for i, window in enumerate(windows))
    kv = KVCacheConfig(block_size=BLOCK_SIZE, num_blocks=num_blocks, groups=groups, bytes_per_block=1)
    limits = SchedulerLimits(max_num_batched_tokens=2048, max_num_seqs=256)
    return EngineCore(make_scheduler(), "measured", limits, ExecutorInfo(kv=kv), max_model_len=8192)


def make_requests(count: int, length: int, shared: int = 0, max_tokens: int = 4096) -> list[EngineRequest]:
    """Requests of `length` tokens, the first `shared` of them common to all."""
    params = SamplingParams(max_tokens=max_tokens)
    return [
        EngineRequest(
            id=f"r{number}",
            prompt_token_ids=[*range(shared), *(7 * number + i for i in range(length - shared))],
            params=params,
            arrival_time=float(number),
            seed=number,
        )
        for number in range(count)
    ]


def run_step(core: EngineCore, now: float) -> StepPlan | None:
    """One step: plan, and update with a null result."""
    plan = core.plan(now)
    if plan is not None:
        core.update(null_result(plan), now)
    return plan


def step_seconds(
    make_scheduler: MakeScheduler, batch: int, clock: Clock, *, steps: int = 200, windows: Sequence[int] = (0,)
) -> float:
    """Seconds of one step in which `batch` requests decode, with the making of the null result."""
    core = make_core(make_scheduler, windows=windows)
    for request in make_requests(batch, 100):
        core.add(request, 0.0)
    while any(state.is_prefilling for state in core.queues.running) or len(core.queues.waiting):
        run_step(core, 0.0)
    began = clock.now()
    for _ in range(steps):
        run_step(core, 0.0)
    return (clock.now() - began) / steps


def added_seconds(make_scheduler: MakeScheduler, clock: Clock, *, count: int = 1000, shared: int = 0) -> Added:
    """Add `count` requests of 1,024 tokens with prefix caching, and run until each has its only token."""
    core = make_core(make_scheduler)
    requests = make_requests(count, 1024, shared, max_tokens=1)
    began = clock.now()
    for request in requests:
        core.add(request, 0.0)
    added = clock.now()
    for state in core.queues.waiting.snapshot():  # else done at admission
        core.kv.extend_hashes(state)
    hashed = clock.now()
    while core.has_work:
        run_step(core, 0.0)
    return Added(added - began, hashed - added, clock.now() - hashed)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m interlace.testing.overhead", description=__doc__)
    parser.add_argument("--scheduler", default="fcfs", metavar="NAME", help="the scheduling policy (fcfs)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="runs, of which the best counts (5)")
    args = parser.parse_args(argv)
    target = find_provider("schedulers", args.scheduler)
    clock = MonotonicClock()

    def make() -> Scheduler:
        scheduler: Scheduler = target(target.Options())
        return scheduler

    for windows, name in (((0,), "full attention"), ((0, 512, 512, 512, 512, 512), "1 full and 5 window groups")):
        for batch in BATCHES:
            best = min(step_seconds(make, batch, clock, windows=windows) for _ in range(args.repeat))
            print(f"{batch:4} decoding, {name}: {best * 1e6:8.1f} µs a step")
    for shared in (0, 512):
        runs = [added_seconds(make, clock, shared=shared) for _ in range(args.repeat)]
        add, hashing, admit = (1e3 * min(times) for times in zip(*runs, strict=True))
        print(
            f"1,000 requests of 1,024 tokens, {shared} shared: {add:.1f} ms to add, {hashing:.1f} ms to hash, "
            f"{admit:.1f} ms to admit"
        )


if __name__ == "__main__":
    main()

"""Endless traffic that tries to keep one request from ever being served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interlace.interfaces.scheduler import Scheduler
from interlace.spec import SchedulerLimits
from interlace.testing.harness import STEP_SECONDS, EngineHarness

SECONDS_PER_STEP = 1.0
_WARM_UP = 10
_COMMON = list(range(100, 124))

NEWCOMERS: Mapping[str, Mapping[str, Any]] = {
    "urgent": {"prompt": 4, "max_tokens": 4, "priority": -3},
    "short": {"prompt": 1, "max_tokens": 1},
    "filling": {"prompt": 8, "max_tokens": 1},
    "long_prompt": {"prompt": 40, "max_tokens": 2},
    "long_output": {"prompt": 4, "max_tokens": 24},
    "unimportant": {"prompt": 6, "max_tokens": 6, "priority": 3},
    "cached": {"prompt": _COMMON, "max_tokens": 2},
    "other_tenant": {"prompt": 6, "max_tokens": 6, "labels": {"tenant": "loud"}},
    "siblings": {"prompt": 6, "max_tokens": 3, "copies": 4},
}
"""Kinds of requests of which there is no end: fields of the request, with the length of its prompt."""

VICTIMS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"prompt": 6, "max_tokens": 6},
    "long": {"prompt": 48, "max_tokens": 12},
    "tiny": {"prompt": 1, "max_tokens": 1},
    "unimportant": {"prompt": 6, "max_tokens": 6, "priority": 3, "labels": {"tenant": "quiet"}},
}
"""Kinds of requests that they must not hold up."""

ENGINES: Mapping[str, tuple[SchedulerLimits, int]] = {
    "few seats": (SchedulerLimits(max_num_batched_tokens=64, max_num_seqs=4), 80),
    "few tokens a step": (SchedulerLimits(max_num_batched_tokens=8, max_num_seqs=4), 80),
    "few blocks": (SchedulerLimits(max_num_batched_tokens=64, max_num_seqs=8), 20),
}
"""What there is too little of → budgets, and the number of KV blocks of 4 tokens."""


def steps_to_serve(policy: Scheduler, newcomers: str, victim: str, engine: str, most: int) -> int | None:
    """Steps from the arrival of the victim to its last token, while there are always more newcomers waiting than the
    engine has seats; None if it has not ended after `most` steps. A step takes one second of the virtual clock.

    Raises `AssertionError` when the engine, afterwards, does not end as it should."""
    limits, num_blocks = ENGINES[engine]
    harness = EngineHarness(policy, limits=limits, num_blocks=num_blocks, block_size=4)
    traffic = _Traffic(harness, NEWCOMERS[newcomers], limits.max_num_seqs + 4)
    for _ in range(_WARM_UP):
        traffic.step()
    name = traffic.add(VICTIMS[victim])
    steps = 0
    while harness.records[name].finish is None and steps < most:
        traffic.step()
        steps += 1
    served = harness.records[name].finish
    harness.abort(*harness.core.queues.requests)
    harness.run()
    return steps if served is not None else None


class _Traffic:
    """Newcomers of one kind, as many as it takes."""

    def __init__(self, harness: EngineHarness, kind: Mapping[str, Any], num_waiting: int) -> None:
        self._harness = harness
        self._kind = kind
        self._num_waiting = num_waiting
        self._serial = 0

    def step(self) -> None:
        """One step of an engine for which there is more to do than it can."""
        while len(self._harness.core.queues.waiting) < self._num_waiting:
            self.add(self._kind)
        self._harness.step()
        self._harness.clock.advance(SECONDS_PER_STEP - STEP_SECONDS)

    def add(self, kind: Mapping[str, Any]) -> str:
        """One request of a kind, or several siblings; returns the id of the last."""
        fields = dict(kind)
        prompt, copies = fields.pop("prompt"), fields.pop("copies", 1)
        self._serial += 1
        own = self._serial % 200
        # Prompts of different requests differ from their first token on, unless the kind says what they share.
        tokens = [own] * prompt if isinstance(prompt, int) else [*prompt, own]
        name = ""
        for index in range(copies):
            group = f"g{self._serial}" if copies > 1 else None
            name = self._harness.add(tokens, sample_index=index, group=group, **fields)
        return name

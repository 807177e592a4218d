"""Where the time of a decode step goes: the worker's parts, and the model's ops."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import msgspec

from interlace.clock import MonotonicClock
from interlace.kv.specs import KVCacheConfig
from interlace.messages import Admission, BlockDelta, SamplingParams, StepPlan
from interlace.spec import ResolvedSpec
from interlace.worker.worker import Worker

WARM_UP = 3


class StepProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `interlace bench step`: medians over the steps, in microseconds."""

    requests: int
    context: int
    steps: int
    parts: dict[str, float]
    """`batch`, `model` and `sampling` make up the step; `model: …` are the model's ops, run one by one. On a GPU
    `submit` (the host's work, hidden by the step before it in an engine) and `wait` do."""

    @property
    def total(self) -> float:
        return sum(value for name, value in self.parts.items() if not name.startswith("model:"))


class StepPlans:
    """The plans of equal requests that decode in step. No engine: each step is all that runs."""

    def __init__(self, spec: ResolvedSpec, kv: KVCacheConfig, requests: int, context: int, steps: int) -> None:
        """`requests` prompts of `context` tokens, with room for `steps` more each."""
        self._spec = spec
        self._kv = kv
        self._requests = requests
        self._context = context
        self._steps = steps
        self._number = 0

    def prefill(self) -> Iterator[StepPlan]:
        """To be run first, in this order."""
        spec, kv, context = self._spec, self._kv, self._context
        vocab = spec.model_config.vocab_size
        per_request = -(-(context + self._steps + WARM_UP + 1) // kv.block_size)
        free = iter(range(1, kv.num_blocks))
        for slot in range(self._requests):
            admission = Admission(
                slot=slot,
                generation=1,
                token_ids=[(7 * slot + 13 * place) % vocab for place in range(context)],
                num_prompt_tokens=context,
                num_cached_tokens=0,
                params=SamplingParams(max_tokens=self._steps + WARM_UP + 1, temperature=0.0),
                seed=slot,
                sample_index=0,
                stop_token_ids=(),
            )
            blocks = [BlockDelta([slot], [per_request], [next(free) for _ in range(per_request)]) for _ in kv.groups]
            done = 0
            while done < context:  # in chunks as a step's budget cuts them
                part = min(context - done, spec.limits.max_num_batched_tokens)
                first = done == 0
                yield StepPlan(
                    step_id=self._next_id(),
                    slots=[slot],
                    num_tokens=[part],
                    sample=[done + part == context],
                    blocks=blocks if first else self._no_blocks(),
                    admitted=[admission] if first else [],
                )
                done += part

    def decode(self) -> StepPlan:
        """The next token of every request."""
        return StepPlan(
            step_id=self._next_id(),
            slots=list(range(self._requests)),
            num_tokens=[1] * self._requests,
            sample=[True] * self._requests,
            blocks=self._no_blocks(),
        )

    def _no_blocks(self) -> list[BlockDelta]:
        return [BlockDelta([], [], []) for _ in self._kv.groups]

    def _next_id(self) -> int:
        self._number += 1
        return self._number


def profile_step(spec: ResolvedSpec, requests: int, context: int, steps: int) -> StepProfile:
    """Medians over `steps` decode steps of `requests` requests, the first of them at `context` tokens each."""
    worker = Worker(spec, lambda event: None, MonotonicClock())
    try:
        plans = StepPlans(spec, worker.start().kv, requests, context, steps)
        for plan in plans.prefill():
            worker.execute(plan)
        for _ in range(WARM_UP):
            worker.profile(plans.decode())
        profiles = [worker.profile(plans.decode()) for _ in range(steps)]
    finally:
        worker.shutdown()
    parts = {name: 1e6 * statistics.median(one[name] for one in profiles) for name in profiles[0]}
    return StepProfile(requests=requests, context=context, steps=steps, parts=parts)

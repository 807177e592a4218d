"""A step between its plan and its result, and what a policy is told of it afterwards."""

from __future__ import annotations

from interlace.kv.block_pool import Key
from interlace.messages import StepPlan
from interlace.request import RequestState


class InFlightStep:
    """What the core remembers of a plan until its result is in."""

    __slots__ = ("generations", "num_preempted", "num_prefill_tokens", "num_tokens", "plan", "published", "requests")

    def __init__(self, plan: StepPlan, requests: list[RequestState], published: list[tuple[int, Key]]) -> None:
        self.plan = plan
        self.requests = requests
        self.generations = [request.generation for request in requests]
        self.published = published
        self.num_tokens = total = sum(plan.num_tokens)
        decodes = total == len(requests)
        self.num_prefill_tokens = 0 if decodes else sum(count for count in plan.num_tokens if count > 1)
        self.num_preempted = len(plan.preempted)


class StepProgress:
    """What `Scheduler.on_update` is given; see `interlace.interfaces.scheduler.Progress`."""

    __slots__ = ("duration", "num_new_tokens", "requests")

    def __init__(self, duration: float, requests: list[RequestState], num_new_tokens: list[int]) -> None:
        self.duration = duration
        self.requests = requests
        self.num_new_tokens = num_new_tokens

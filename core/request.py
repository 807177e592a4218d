"""`RequestState`: the mutable record of one request inside the engine core. It never leaves it.

Policies see it through `interlace.interfaces.scheduler.RequestView` and write nothing. Plain slots, because a slot
read costs a fifth of a property read and the scheduler reads several per request and step.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from interlace.messages import EngineRequest, SamplingParams


class Status(enum.IntEnum):
    """Where a request stands. Ordered: everything from `FINISHED` on is over."""

    WAITING = 0
    """Holds no seat, no slot and no blocks; new, blocked, or preempted."""
    RUNNING = 1
    FINISHED = 2


class RequestState:
    """One request. Token counts, all measured from the first prompt token:

        num_known      tokens whose value the core knows: the prompt and the confirmed output
        num_planned    tokens whose KV is in the cache or will be after the steps under way
        num_in_flight  of those, tokens computed by steps not yet confirmed

    A request has work when `num_known + samples_in_flight > num_planned`; the step that closes the gap samples.
    """

    __slots__ = (
        "arrival_time",
        "block_hashes",
        "blocked_on",
        "blocks",
        "cached_tokens",
        "deadline",
        "eos_token_ids",
        "first_scheduled",
        "generation",
        "group",
        "id",
        "labels",
        "last_planned",
        "max_known",
        "max_tokens",
        "num_in_flight",
        "num_known",
        "num_planned",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "num_published",
        "order",
        "params",
        "priority",
        "request",
        "samples_in_flight",
        "slot",
        "status",
        "stop_set",
        "token_ids",
    )

    def __init__(self, request: EngineRequest, max_model_len: int, num_groups: int) -> None:
        params = request.params
        self.request = request
        self.id: str = request.id
        self.params: SamplingParams = params
        self.priority: int = request.priority
        self.arrival_time: float = request.arrival_time
        self.deadline: float | None = request.deadline
        self.group: str | None = request.group
        self.labels: Mapping[str, str] = request.labels
        self.blocked_on: set[str] = set(request.blocked_on)
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt_tokens: int = len(self.token_ids)
        room = max_model_len - self.num_prompt_tokens
        self.max_tokens: int = room if params.max_tokens is None else min(params.max_tokens, room)
        self.max_known: int = self.num_prompt_tokens + self.max_tokens  # `num_known` at which it ends by length
        self.eos_token_ids: tuple[int, ...] = () if params.ignore_eos else request.eos_token_ids
        self.stop_set: frozenset[int] = frozenset((*self.eos_token_ids, *(params.stop_token_ids or ())))
        self.num_known: int = self.num_prompt_tokens
        self.num_planned: int = 0
        self.num_in_flight: int = 0
        self.samples_in_flight: int = 0
        self.status: Status = Status.WAITING
        self.slot: int = -1
        self.generation: int = 0
        self.blocks: list[list[int]] = [[] for _ in range(num_groups)]  # per KV group, by position
        self.block_hashes: list[bytes] = []  # of full blocks of known tokens, a chain
        self.num_published: int = 0  # leading blocks whose hash is in the prefix cache
        self.num_preemptions: int = 0
        self.num_prompt_logprobs: int = 0  # prompt positions reported; computed again after preemption, not said again
        self.cached_tokens: int | None = None  # hits at first admission
        self.first_scheduled: float | None = None
        self.last_planned: float = request.arrival_time
        self.order: tuple[object, int] = (0, 0)  # place in the waiting queue

    @property
    def num_computed_tokens(self) -> int:
        return self.num_planned

    @property
    def num_output_tokens(self) -> int:
        return self.num_known - self.num_prompt_tokens

    @property
    def is_prefilling(self) -> bool:
        return self.num_known + self.samples_in_flight - self.num_planned > 1

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def in_flight(self) -> bool:
        """Whether a step under way computes tokens of it."""
        return self.num_in_flight > 0

    def __repr__(self) -> str:
        return (
            f"<RequestState {self.id} {self.status.name.lower()} known={self.num_known} planned={self.num_planned} "
            f"in_flight={self.num_in_flight}>"
        )

"""Orderings by how much work a request is. Short ones first means less waiting on average, and no promise to long ones:
in a stream of short requests a long one may wait for ever, unless an ordering that ages comes first."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.ordering import Ordering
from interlace.interfaces.scheduler import RequestView


class ShortestPrompt(Ordering):
    """Fewest prompt tokens first, whatever the prefix cache may spare."""

    class Options(BaseModel):
        """Options of both orderings by length."""

        model_config = ConfigDict(extra="forbid")

        bucket_tokens: int = Field(
            1,
            ge=1,
            description="Lengths are compared in whole multiples of this; more leaves more to the next ordering.",
        )

    def key(self, request: RequestView) -> int:
        return request.num_prompt_tokens // int(self.options.bucket_tokens)


class FewestRemaining(ShortestPrompt):
    """Fewest tokens left to compute first, by the upper limit known when the request starts to wait: the prompt and
    `max_tokens`. A request without `max_tokens` counts with all the room that `max_model_len` leaves it. What it has
    generated is not taken off, so that a preempted request keeps its place."""

    def key(self, request: RequestView) -> int:
        return (request.num_prompt_tokens + request.max_tokens) // int(self.options.bucket_tokens)

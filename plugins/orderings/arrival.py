"""Orderings by when a request came and how urgent it is."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.ordering import Ordering
from interlace.interfaces.scheduler import RequestView


class Fcfs(Ordering):
    """First come, first served. Leaves no ties but those of one instant, so nothing after it matters."""

    starvation_free = True

    def key(self, request: RequestView) -> float:
        return request.arrival_time


class Priority(Ordering):
    """Lower priority number first.

    With aging, each `aging_s` seconds of waiting are worth one level. They are counted in whole windows of the clock,
    so that requests of one priority and window tie and the next ordering decides between them; the price is that a
    request ages by up to one window too much or too little.
    """

    class Options(BaseModel):
        """Options of the ordering `priority`."""

        model_config = ConfigDict(extra="forbid")

        aging_s: float = Field(0.0, ge=0, description="Seconds of waiting worth one priority level; 0 = no aging.")

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        # Without aging, a stream of urgent requests may hold back the others for ever.
        self.starvation_free = bool(self.options.aging_s)

    def key(self, request: RequestView) -> int:
        """Two requests that wait age alike, so aging never changes their order: a fixed key suffices."""
        aging_s: float = self.options.aging_s
        return request.priority + (math.floor(request.arrival_time / aging_s) if aging_s else 0)

"""Priority scheduling: the lower number first, arrival breaks ties, waiting can raise a request over time."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.scheduler import RequestView
from interlace.plugins.schedulers.fcfs import Fcfs


class Priority(Fcfs):
    """First come, first served among equals: waiting requests and victims are taken by priority, then arrival."""

    class Options(BaseModel):
        """Options of `priority`."""

        model_config = ConfigDict(extra="forbid")

        aging_s: float = Field(0.0, ge=0, description="Seconds of waiting worth one priority level; 0 = no aging.")

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        # Without aging, a stream of urgent requests may hold back the others for ever.
        self.starvation_free = bool(self.options.aging_s)

    def order_key(self, request: RequestView) -> Any:
        """Two requests that wait age alike, so aging never changes their order: a fixed key suffices."""
        aging = request.arrival_time / self.options.aging_s if self.options.aging_s else 0.0
        return (request.priority + aging, request.arrival_time)

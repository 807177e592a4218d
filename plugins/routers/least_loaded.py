"""`least_loaded`: the least busy replica."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.router import WAITING_WEIGHT, ReplicaView, RoutedRequest, Router, least_loaded


class LeastLoaded(Router):
    """The smallest sum of running and weighted waiting requests; equals take turns."""

    class Options(BaseModel):
        """Options of `least_loaded`."""

        model_config = ConfigDict(extra="forbid")

        waiting_weight: float = Field(
            WAITING_WEIGHT, ge=0, description="What a waiting request counts for, against a running one."
        )

    def route(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> int:
        return least_loaded(replicas, self.options.waiting_weight).index

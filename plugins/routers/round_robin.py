"""`round_robin`: one replica after the other."""

from __future__ import annotations

from collections.abc import Sequence

from interlace.interfaces.router import ReplicaView, RoutedRequest, Router


class RoundRobin(Router):
    """The replica whose last request is longest ago: so nobody is skipped or served twice when one is lost or comes
    back. It looks at neither load nor prompts."""

    def route(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> int:
        return min(replicas, key=lambda replica: (replica.last_sent, replica.index)).index

"""The contract of routers (version 1): which of several equal engines a request goes to (`engine.replicas`).

A router chooses; it cannot lose a request: what it says is checked, and where it fails `least_loaded` chooses instead.
Built in: `prefix_affinity`, `least_loaded`, `round_robin`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from interlace.messages import SamplingParams

WAITING_WEIGHT = 4.0
"""What a request that waits counts for, against one that runs; see `least_loaded`."""


class ReplicaView(Protocol):
    """What a router may read of one replica. Counts are of samples, as the front knows them: a request counts from the
    moment it is routed."""

    @property
    def index(self) -> int:
        """Number of the replica, from 0; what `route` returns."""
        ...

    @property
    def num_waiting(self) -> int:
        """Sent, and no step has computed anything of them yet."""
        ...

    @property
    def num_running(self) -> int:
        """Started and not ended."""
        ...

    @property
    def kv_usage(self) -> float:
        """Share of its KV blocks in use, 0 to 1, as of its newest step."""
        ...

    @property
    def num_blocks(self) -> int:
        """KV blocks that its requests can hold."""
        ...

    @property
    def last_sent(self) -> int:
        """Number of the newest request that went to it, counted over all replicas from 1; 0: none did. Choosing the
        smallest among equals takes turns."""
        ...


class RoutedRequest(Protocol):
    """What a router may read of a request. All samples of one prompt (`n > 1`) are one request and stay together."""

    @property
    def id(self) -> str: ...
    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def params(self) -> SamplingParams:
        """Of its first sample."""
        ...

    @property
    def priority(self) -> int: ...
    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def arrival_time(self) -> float:
        """Seconds of a clock whose zero means nothing."""
        ...

    @property
    def block_hashes(self) -> Sequence[bytes]:
        """Hashes of the prompt's full KV blocks, those by which the engines find cached prefixes: equal hashes mean
        equal tokens from the beginning on, under the same cache salt and adapter. Made when first asked for, so only
        a router that asks pays for it (about 1 µs a block). Empty where prefix caching is off."""
        ...


class Router(ABC):
    """A routing policy. `route` is the only method one must write.

    One instance lives in the front and is called by one thread at a time (not always the same one). It may keep state
    between calls. All calls are on the way of requests: they must be quick, and must not block.
    """

    class Options(BaseModel):
        """Typed options; a subclass replaces this. `self.options` is a validated instance."""

        model_config = ConfigDict(extra="forbid")

    def __init__(self, options: BaseModel) -> None:
        self.options: Any = options

    @abstractmethod
    def route(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> int:
        """The `index` of the one of `replicas` that is to take `request`. `replicas` are those that can: at least two,
        by index. Called once per request, and again if the replica turns out to be gone."""

    def on_routed(self, request: RoutedRequest, replica: ReplicaView) -> None:
        """`request` goes to `replica`: the one that `route` named, or another one where there was no choice or `route`
        failed."""

    def on_finished(self, request: RoutedRequest, replica: ReplicaView) -> None:
        """All samples of a routed request have ended, however they did; once for each `on_routed`."""

    def on_replica_lost(self, replica: ReplicaView) -> None:
        """A replica died, and with it its cache; comes after `on_finished` of each request it had."""

    def on_replica_back(self, replica: ReplicaView) -> None:
        """A replica that was lost takes requests again. Its cache is empty."""

    def on_caches_reset(self) -> None:
        """The prefix caches of all replicas were emptied."""


def load(replica: ReplicaView, waiting_weight: float = WAITING_WEIGHT) -> float:
    """How busy a replica is: running requests, plus waiting ones `waiting_weight` times. One that waits says that there
    is no room, one that runs shares its steps with others almost for nothing; the weight is vLLM's."""
    return replica.num_running + waiting_weight * replica.num_waiting


def least_loaded(replicas: Sequence[ReplicaView], waiting_weight: float = WAITING_WEIGHT) -> ReplicaView:
    """The least busy of `replicas` (see `load`); equals take turns. What the core falls back to."""
    return min(replicas, key=lambda replica: (load(replica, waiting_weight), replica.last_sent, replica.index))

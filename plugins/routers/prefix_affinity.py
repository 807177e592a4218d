"""`prefix_affinity`: requests with the same beginning go to the same replica, which has it in its prefix cache.

The idea is that of the cache-aware routers of SGLang (LMSYS blog, 2024-12-04) and vLLM: the router remembers what it
sent where, and asks no engine. They keep prompts in a tree per replica and compare the busiest replica with the idlest;
here it is the hashes of full KV blocks, the engines' own, and the replica that would be chosen is compared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.router import ReplicaView, RoutedRequest, Router, least_loaded, load


class PrefixAffinity(Router):
    """The replica with the longest known beginning of the prompt, the least busy one among equals, if

    - that beginning is at least `min_share` of the prompt's full blocks, and
    - it is not much busier than the least busy replica: `load <= max_imbalance + max_ratio * least load`, `load`
      being that of `least_loaded`.

    Otherwise the least busy replica, which thereby learns the prompt: a beginning that one replica cannot serve alone
    spreads to others. Of a replica as much is known as its cache holds, the least recently used is forgotten first, and
    all of it when the replica is lost.
    """

    class Options(BaseModel):
        """Options of `prefix_affinity`."""

        model_config = ConfigDict(extra="forbid")

        min_share: float = Field(
            0.3, ge=0, le=1, description="Share of the prompt's full blocks that must be known for affinity to count."
        )
        max_imbalance: float = Field(
            4.0, ge=0, description="Load that a replica may have more than the least busy one and keep its prompts."
        )
        max_ratio: float = Field(1.5, ge=1, description="The same as a multiple of the least load; both are added.")
        max_blocks: int = Field(
            65_536, ge=1, description="Block hashes remembered of a replica, at most (about 200 bytes each)."
        )

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        self._known: dict[int, OrderedDict[bytes, None]] = {}  # replica → hashes of blocks, in order of last use

    def route(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> int:
        idlest = least_loaded(replicas)
        hashes = request.block_hashes
        if not hashes:
            return idlest.index
        matches = {replica.index: self._match(replica.index, hashes) for replica in replicas}
        longest = max(matches.values())
        if longest == 0 or longest < self.options.min_share * len(hashes):
            return idlest.index
        best = least_loaded([replica for replica in replicas if matches[replica.index] == longest])
        bound = self.options.max_imbalance + self.options.max_ratio * load(idlest)
        return best.index if load(best) <= bound else idlest.index

    def _match(self, index: int, hashes: Sequence[bytes]) -> int:
        """How many of the prompt's blocks, from the first on, the replica is known to have."""
        known = self._known.get(index)
        if not known:
            return 0
        return next((place for place, one in enumerate(hashes) if one not in known), len(hashes))

    def on_routed(self, request: RoutedRequest, replica: ReplicaView) -> None:
        known = self._known.setdefault(replica.index, OrderedDict())
        for one in reversed(request.block_hashes):  # ends first, so that shared beginnings are forgotten last
            known[one] = None
            known.move_to_end(one)
        most = min(self.options.max_blocks, replica.num_blocks)
        while len(known) > most:
            known.popitem(last=False)

    def on_replica_lost(self, replica: ReplicaView) -> None:
        self._known.pop(replica.index, None)

    def on_caches_reset(self) -> None:
        self._known.clear()

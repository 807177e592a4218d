"""`KVManager`: gives requests the KV blocks they need, shares prefixes, and takes everything back.

One pool serves all KV groups (see `kv.specs.group_layers`). A request has one block table per group; sliding-window
groups hold only the blocks that the window can still see, with the null block in the places before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from interlace.kv.block_pool import BlockPool, Key
from interlace.kv.prefix_cache import chain_root, extend_chain
from interlace.kv.specs import NULL_BLOCK, KVCacheConfig
from interlace.request import RequestState


class PrefixHit(NamedTuple):
    """The longest cached prefix of a request, found but not yet taken."""

    num_tokens: int
    tables: list[list[int]]
    """Per group: block ids by position, `NULL_BLOCK` where the window does not reach."""
    missing: bytes | None
    """Hash of the first block after it that is known but not cached."""


class KVManager:
    """Block tables of all requests of one engine. Called from the engine core only."""

    def __init__(self, config: KVCacheConfig, prefix_caching: bool = True, max_step_tokens: int = 1) -> None:
        """`max_step_tokens` bounds one request's tokens in one step, and so what a window group holds at most."""
        self.config = config
        self.block_size = config.block_size
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(config.num_blocks)
        self._windows = [group.window for group in config.groups]
        self._num_groups = len(config.groups)
        # Most blocks a group ever holds of one request: the window, a step's tokens, a partial block at either end.
        self._most = [(w + max_step_tokens) // config.block_size + 2 if w else config.num_blocks for w in self._windows]

    # ── prefix cache ──────────────────────────────────────────────────────────────────────────────────────────

    def _root(self, request: RequestState) -> bytes | None:
        """Where the request's hash chain starts; None: its blocks are never shared.

        Samples of one prompt (`n > 1`) share blocks even when prefix caching is off, under a root of their own."""
        if not self._num_groups:
            return None
        base = (request.request.cache_salt, request.request.adapter)
        if self.prefix_caching:
            return chain_root(*base)
        return None if request.group is None else chain_root(*base, request.group)

    def extend_hashes(self, request: RequestState) -> None:
        """Hash the full blocks of all tokens known by now."""
        if request.num_known // self.block_size > len(request.block_hashes):
            root = self._root(request)
            if root is not None:
                extend_chain(request.block_hashes, root, request.token_ids, self.block_size, request.num_known)

    def find_prefix(self, request: RequestState) -> PrefixHit:
        """The longest prefix that every group can serve. The last known token is never part of it: computing it
        gives the logits to sample from."""
        empty = PrefixHit(0, [[] for _ in range(self._num_groups)], None)
        if request.params.skip_reading_prefix_cache or request.params.prompt_logprobs is not None:
            return empty
        self.extend_hashes(request)
        limit = min((request.num_known - 1) // self.block_size, len(request.block_hashes))
        length = limit
        while True:  # shrink until all groups agree; each round can only get shorter
            agreed = length
            for group, window in enumerate(self._windows):
                agreed = self._longest(request, group, window, agreed)
            if agreed == length:
                break
            length = agreed
        missing = request.block_hashes[length] if length < limit else None
        if length == 0:
            return PrefixHit(0, empty.tables, missing)
        tables = [self._hit_table(request, group, window, length) for group, window in enumerate(self._windows)]
        return PrefixHit(length * self.block_size, tables, missing)

    def _first_visible(self, num_tokens: int, window: int) -> int:
        """Index of the first block a window group needs when token `num_tokens` is computed next."""
        return max(0, num_tokens - window + 1) // self.block_size if window else 0

    def _longest(self, request: RequestState, group: int, window: int, limit: int) -> int:
        """Longest hit of at most `limit` blocks in one group."""
        cached, hashes = self.pool.lookup, request.block_hashes
        if not window:
            for index in range(limit):
                if cached(group, hashes[index]) is None:
                    return index
            return limit
        length = limit
        while length:  # from the end: the window must be covered by a run of cached blocks
            first = self._first_visible(length * self.block_size, window)
            gap = next((i for i in range(length - 1, first - 1, -1) if cached(group, hashes[i]) is None), None)
            if gap is None:
                return length
            length = gap
        return 0

    def _hit_table(self, request: RequestState, group: int, window: int, length: int) -> list[int]:
        first = self._first_visible(length * self.block_size, window)
        table = [NULL_BLOCK] * first
        for index in range(first, length):
            block = self.pool.lookup(group, request.block_hashes[index])
            assert block is not None  # `_longest` has just seen it
            table.append(block)
        return table

    def publish(self, request: RequestState) -> list[tuple[int, Key]]:
        """Publish the blocks that are full of known, planned tokens; returns what was published, for `withdraw`."""
        full = min(request.num_known, request.num_planned) // self.block_size
        if request.num_published >= full:
            return []
        self.extend_hashes(request)
        published = []
        for index in range(request.num_published, min(full, len(request.block_hashes))):
            for group, table in enumerate(request.blocks):
                key = (group, request.block_hashes[index])
                if table[index] != NULL_BLOCK and self.pool.publish(table[index], key):
                    published.append((table[index], key))
        request.num_published = full
        return published

    def withdraw(self, published: Iterable[tuple[int, Key]]) -> None:
        """Unpublish blocks whose content was never computed because their step failed."""
        for block, key in published:
            self.pool.withdraw(block, key)

    # ── blocks ────────────────────────────────────────────────────────────────────────────────────────────────

    def num_missing(self, request: RequestState, end: int) -> int:
        """New blocks a running request needs before its tokens up to `end` can be computed in the next step."""
        wanted = -(-end // self.block_size)
        return sum(max(0, wanted - len(table)) for table in request.blocks)

    def num_reserved(self, request: RequestState) -> int:
        """Free blocks a running request will still take for the tokens it knows by now."""
        wanted = -(-request.num_known // self.block_size)
        return sum(min(max(0, wanted - len(t)), most) for t, most in zip(request.blocks, self._most, strict=True))

    def num_needed(self, hit: PrefixHit, end: int) -> int:
        """Free blocks that admission with `hit` takes to reach `end`: new ones, and hits that are free now."""
        wanted = -(-end // self.block_size)
        needed = 0
        for most, table in zip(self._most, hit.tables, strict=True):
            unheld = sum(1 for block in table if block != NULL_BLOCK and self.pool.is_free(block))
            needed += min(unheld + wanted - len(table), most)
        return needed

    def admit(self, request: RequestState, hit: PrefixHit) -> None:
        """Take the blocks of a hit. The request holds none yet."""
        for table, found in zip(request.blocks, hit.tables, strict=True):
            for block in found:
                if block != NULL_BLOCK:
                    self.pool.share(block)
            table[:] = found
        request.num_published = hit.num_tokens // self.block_size

    def trim(self, request: RequestState) -> None:
        """Return blocks that the windows can no longer see. They may still be read by a step under way: steps run in
        order, so a new owner writes them only after that."""
        for window, table in zip(self._windows, request.blocks, strict=True):
            if not window:
                continue
            stale = []
            for index in range(min(self._first_visible(request.num_planned, window), len(table)) - 1, -1, -1):
                if table[index] == NULL_BLOCK:
                    break
                stale.append(table[index])
                table[index] = NULL_BLOCK
            self.pool.release(stale)

    def grow(self, request: RequestState, end: int) -> list[list[int]]:
        """Extend every table to hold tokens up to `end`; returns the new ids per group.

        The caller has checked `num_missing` against `pool.num_free`."""
        wanted = -(-end // self.block_size)
        new = []
        for table in request.blocks:
            ids = self.pool.allocate(wanted - len(table)) if wanted > len(table) else []
            table += ids
            new.append(ids)
        return new

    def free(self, request: RequestState) -> int:
        """Take back every block, tails first so that shared beginnings stay cached longest. Returns blocks freed."""
        freed = 0
        for table in request.blocks:
            freed += self.pool.release(reversed(table))
            table.clear()
        request.num_published = 0
        return freed

    # ── facts ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def usage(self) -> float:
        """Share of usable blocks held by requests, 0 to 1."""
        return 1.0 - self.pool.num_free / self.pool.num_usable

    def check_integrity(self, requests: Iterable[RequestState]) -> None:
        """Raise `AssertionError` unless exactly the blocks of `requests` and the pins are held."""
        references: dict[int, int] = {}
        for request in requests:
            for group, table in enumerate(request.blocks):
                live = [block for block in table if block != NULL_BLOCK]
                if len(set(live)) != len(live):
                    raise AssertionError(f"{request!r} names a block twice in group {group}")
                if len(table) * self.block_size < request.num_planned:
                    raise AssertionError(f"{request!r} has only {len(table)} blocks in group {group}")
                for block in live:
                    references[block] = references.get(block, 0) + 1
        self.pool.check_integrity(references)

"""Shard arithmetic of tensor parallelism: who holds which heads, rows and columns.

Parts are as equal as they can be; where they are not, the first ranks hold more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from interlace.errors import ConfigError

_KERNEL_GRAIN = 32


class HeadShare(NamedTuple):
    """Attention heads of one rank: `query` heads from `first_query`, `kv` heads from `first_kv`."""

    query: int
    first_query: int
    kv: int
    first_kv: int

    def query_part(self, head_size: int) -> slice:
        """Where this rank's query heads lie: rows of the query projection, columns of the output projection."""
        return slice(self.first_query * head_size, (self.first_query + self.query) * head_size)

    def kv_part(self, head_size: int) -> slice:
        """Rows of the key and of the value projection."""
        return slice(self.first_kv * head_size, (self.first_kv + self.kv) * head_size)


def deal(total: int, rank: int, size: int) -> slice:
    """The run of `total` items that is this rank's; the first ranks have one more where they do not come out even."""
    each, more = divmod(total, size)
    first = rank * each + min(rank, more)
    return slice(first, first + each + (rank < more))


def share(total: int, rank: int, size: int, what: str, grain: int = 1) -> slice:
    """This rank's part of `total` rows or columns. Parts are equal if that cuts at multiples of `grain`, a power of
    two; else they are dealt out in pieces of `grain` (and of 32, which kernels like), or of half as many, and so on
    until there is one for each rank.

    Raises `ConfigError` naming `what` if there is nothing for some rank."""
    if total < size:
        raise ConfigError(
            f"executor option tensor_parallel = {size} is more than {what} = {total}; use {total} at most"
        )
    piece = total // size
    if total % size or piece % grain:
        piece = math.gcd(total, max(grain, _KERNEL_GRAIN))
        while total // piece < size:
            piece //= 2
    part = deal(total // piece, rank, size)
    return slice(part.start * piece, part.stop * piece)


def share_heads(num_heads: int, num_kv_heads: int, rank: int, size: int) -> HeadShare:
    """Deal out KV heads with the query heads that attend to them. With fewer KV heads than ranks, neighbouring ranks
    hold a copy of the same KV head, and its query heads are dealt out among them.

    Raises `ConfigError` if some rank would have no query head."""
    if num_heads % num_kv_heads:
        raise ConfigError(f"{num_heads} attention heads do not divide into {num_kv_heads} KV heads")
    if num_heads < size:
        raise ConfigError(
            f"executor option tensor_parallel = {size} is more than the model's {num_heads} attention heads; "
            f"use {num_heads} at most"
        )
    group = num_heads // num_kv_heads  # query heads of a KV head
    if size <= num_kv_heads:
        kv = deal(num_kv_heads, rank, size)
        return HeadShare((kv.stop - kv.start) * group, kv.start * group, kv.stop - kv.start, kv.start)
    holders = [deal(size, head, num_kv_heads) for head in range(num_kv_heads)]  # KV head → its ranks
    first_kv = next(head for head, ranks in enumerate(holders) if rank < ranks.stop)
    ranks = holders[first_kv]
    query = deal(group, rank - ranks.start, ranks.stop - ranks.start)
    return HeadShare(query.stop - query.start, first_kv * group + query.start, 1, first_kv)

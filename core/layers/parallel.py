"""Shard arithmetic of tensor parallelism: who holds which heads, rows and columns."""

from __future__ import annotations

from typing import NamedTuple

from interlace.errors import ConfigError


class HeadShare(NamedTuple):
    """Attention heads of one rank: `query` heads from `first_query`, `kv` heads from `first_kv`."""

    query: int
    first_query: int
    kv: int
    first_kv: int


def share(total: int, rank: int, size: int, what: str) -> slice:
    """This rank's equal part of `total` items. Raises `ConfigError` naming `what` if they cannot be dealt out."""
    if total % size:
        raise ConfigError(f"tensor_parallel = {size} does not divide {what} = {total}; use a divisor of {total}")
    part = total // size
    return slice(rank * part, (rank + 1) * part)


def share_heads(num_heads: int, num_kv_heads: int, rank: int, size: int) -> HeadShare:
    """Deal out heads. With fewer KV heads than ranks, neighbouring ranks hold a copy of the same KV head.

    Raises `ConfigError` if the number of ranks does not fit the numbers of heads."""
    query = share(num_heads, rank, size, "the number of attention heads")
    if num_kv_heads < size:
        share(size, 0, num_kv_heads, "the number of ranks over KV heads")
        return HeadShare(num_heads // size, query.start, 1, rank * num_kv_heads // size)
    kv = share(num_kv_heads, rank, size, "the number of KV heads")
    return HeadShare(num_heads // size, query.start, num_kv_heads // size, kv.start)

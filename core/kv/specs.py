"""How KV memory is cut: groups of layers, one block size, one pool. Plain data and arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from interlace.errors import CapacityError

NULL_BLOCK = 0
"""Block 0 is a placeholder in block tables: never allocated, never read unmasked."""


class KVGroup(msgspec.Struct, frozen=True):
    """Layers that share a block table."""

    kind: str
    """`full` or `window` (open name)."""
    window: int
    """For `window`: a token sees itself and the `window - 1` before it. 0 for `full`."""
    layers: tuple[int, ...]
    """Attention layer indices. Layer `layers[j]` keeps its data in cache tensor `j`."""


class KVCacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The whole cache. One block id means `block_size` tokens in each of `tensors` cache tensors, for one group."""

    block_size: int
    num_blocks: int
    """Including the null block."""
    groups: tuple[KVGroup, ...]
    bytes_per_block: int

    @property
    def num_tensors(self) -> int:
        return max((len(group.layers) for group in self.groups), default=0)


def group_layers(keys: Sequence[tuple[Any, ...]]) -> tuple[KVGroup, ...]:
    """Cut layers into groups of equal size, so that one pool of equal blocks serves all of them.

    `keys[i]` is `AttentionSpec.kv_key` of layer i: kind, window, KV heads, head size, and more. Layers of one key form
    one or more groups of at most `size` layers, `size` being the smallest number of layers any key has; so blocks move
    freely between kinds (the idea of vLLM's hybrid KV manager). Raises `CapacityError` if keys differ in bytes per
    token: such models need a pool for each.
    """
    by_key: dict[tuple[Any, ...], list[int]] = {}
    for layer, key in enumerate(keys):
        by_key.setdefault(key, []).append(layer)
    if len({(heads * size) for _, _, heads, size, *_ in by_key}) > 1:
        raise CapacityError(f"layers need KV blocks of different sizes, which is not supported: {sorted(by_key)}")
    size = min((len(layers) for layers in by_key.values()), default=0)
    groups = []
    for (kind, window, *_), layers in by_key.items():
        parts = -(-len(layers) // size)
        # Deal layers out evenly: 7 layers in groups of at most 3 are 3 + 2 + 2.
        groups += [KVGroup(kind, window, tuple(layers[part::parts])) for part in range(parts)]
    return tuple(groups)


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)

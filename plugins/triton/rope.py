"""Rotary embedding, alone or with all that stands between a layer's QKV projection and its attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from interlace.interfaces.attention import HeadNorms
from interlace.plugins.triton.kv_cache import CacheView, store_vectors
from interlace.plugins.triton.runtime import launch

_TILE = 2048
"""Values that one program turns."""


class CacheSlots(NamedTuple):
    """Where a step's keys and values are kept."""

    view: CacheView
    slots: torch.Tensor
    """[tokens] int64, dense; negative: nowhere."""
    block_size: int


def rope(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    norms: HeadNorms | None = None,
    value: torch.Tensor | None = None,
    cache: CacheSlots | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Kernels.rope` in one launch, computed in float32, of heads that are normed first where `norms` says how.

    query [tokens, heads, head_size], key, value [tokens, kv_heads, head_size], positions [tokens],
    cos_sin [max_position, rotary] float32; the last dimensions must be dense. With `cache`, keys and `value` are kept
    there, and the keys returned mean nothing. A position outside the table gives NaN."""
    tokens, heads, size = query.shape
    turned = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    turned_key = torch.empty(key.shape if cache is None else (0,), dtype=key.dtype, device=key.device)
    value = key if value is None else value
    data, scales, block_stride = (None, None, 0) if cache is None else cache.view
    constants = rope_constants(
        (heads, key.shape[1], size),
        cos_sin.shape[1],
        norm=norms is not None,
        unit_offset=norms is not None and norms.unit_offset,
        block_size=0 if cache is None else cache.block_size,
    )
    num_heads = heads + key.shape[1] * (1 if cache is None else 2)
    launch(
        rope_kernel, (tokens, triton.cdiv(num_heads, constants["TILE"]) if size else 0),
        query, key, value, *((None, None) if norms is None else norms[:2]), turned, turned_key, positions, cos_sin,
        data, scales, None if cache is None else cache.slots, cos_sin.shape[0], *query.stride()[:2], *key.stride()[:2],
        *value.stride()[:2], positions.stride(0), cos_sin.stride(0), block_stride, 0.0 if norms is None else norms.eps,
        **constants,
    )  # fmt: skip
    return turned, turned_key


def rope_constants(
    shape: tuple[int, int, int], rotary: int, *, norm: bool = False, unit_offset: bool = False, block_size: int = 0
) -> dict[str, Any]:
    """Compile-time arguments of `rope_kernel` for (heads, KV heads, head size); `block_size` 0: without a cache."""
    heads, kv_heads, size = shape
    block = triton.next_power_of_2(max(size, 1))
    num_heads = heads + kv_heads * (2 if block_size else 1)
    tile = max(1, min(triton.next_power_of_2(max(num_heads, 1)), _TILE // block))
    return {
        "NUM_HEADS": heads,
        "NUM_KV_HEADS": kv_heads,
        "HEAD_SIZE": size,
        "HALF": rotary // 2,
        "NORM": norm,
        "UNIT_OFFSET": unit_offset,
        "BLOCK_SIZE": block_size,
        "TILE": tile,
        "BLOCK_D": block,
        "num_warps": min(max(tile * block // 256, 1), 4),
    }


@triton.jit
def _load_heads(query, key, value, ids, channels, mask, WRITE: tl.constexpr, NUM_HEADS: tl.constexpr,
                NUM_KV_HEADS: tl.constexpr):  # fmt: skip
    """Heads [tile, channels] of one token, float32. `query`, `key`, `value`: (pointer, head stride)."""
    from_query = query[0] + ids[:, None] * query[1] + channels[None, :]
    x = tl.load(from_query, mask=(ids < NUM_HEADS)[:, None] & mask, other=0.0).to(tl.float32)
    own = ids - NUM_HEADS
    is_key = (own >= 0) & (own < NUM_KV_HEADS)
    x += tl.load(key[0] + own[:, None] * key[1] + channels[None, :], mask=is_key[:, None] & mask, other=0.0)
    if WRITE:
        own = ids - NUM_HEADS - NUM_KV_HEADS
        is_value = (own >= 0) & (own < NUM_KV_HEADS)
        x += tl.load(value[0] + own[:, None] * value[1] + channels[None, :], mask=is_value[:, None] & mask, other=0.0)
    return x


@triton.jit
def _weigh(x, query_weight, key_weight, is_query, channels, mask, UNIT_OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """Normed heads times their weights, rounded where the reference rounds; float32."""
    of_query = tl.load(query_weight + channels, mask=mask, other=0.0).to(tl.float32)
    of_key = tl.load(key_weight + channels, mask=mask, other=0.0).to(tl.float32)
    weight = tl.where(is_query[:, None], of_query[None, :], of_key[None, :])
    if UNIT_OFFSET:
        return (x * (1.0 + weight)).to(DTYPE).to(tl.float32)
    return (x.to(DTYPE).to(tl.float32) * weight).to(DTYPE).to(tl.float32)


@triton.jit
def rope_kernel(
    query, key, value, query_weight, key_weight, out, out_key, positions, table, data, scales, slots,
    num_positions, query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride,
    position_stride, table_stride, block_stride, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token, `TILE` of its heads: queries, then keys, then (with a cache, BLOCK_SIZE > 0) values."""
    token = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    channels = tl.arange(0, BLOCK_D)
    # The channel that each is turned with: the same one of the other half. Past both halves nothing is turned.
    partners = tl.where(channels < HALF, channels + HALF, tl.where(channels < 2 * HALF, channels - HALF, channels))
    mask = (channels < HEAD_SIZE)[None, :]
    q = (query + token * query_stride, query_head_stride)
    k = (key + token * key_stride, key_head_stride)
    v = (value + token * value_stride, value_head_stride)
    x = _load_heads(q, k, v, ids, channels, mask, BLOCK_SIZE > 0, NUM_HEADS, NUM_KV_HEADS)
    partner = _load_heads(q, k, v, ids, partners, mask, BLOCK_SIZE > 0, NUM_HEADS, NUM_KV_HEADS)
    is_query, is_turned = ids < NUM_HEADS, ids < NUM_HEADS + NUM_KV_HEADS
    given = x
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_SIZE + eps)[:, None]  # [tile, 1]
        is_channel = channels < HEAD_SIZE
        dtype: tl.constexpr = query.dtype.element_ty
        x = _weigh(x * inverse, query_weight, key_weight, is_query, channels, is_channel, UNIT_OFFSET, dtype)
        partner = _weigh(
            partner * inverse, query_weight, key_weight, is_query, partners, is_channel, UNIT_OFFSET, dtype
        )
    position = tl.load(positions + token * position_stride).to(tl.int64)
    is_known = (position >= 0) & (position < num_positions)
    places = table + position * table_stride + channels % HALF if HALF > 0 else table + channels
    moves = channels < 2 * HALF
    unknown = float("nan")
    cos = tl.where(moves, tl.load(places, mask=moves & is_known, other=unknown), 1.0)
    sin = tl.where(moves, tl.load(places + HALF, mask=moves & is_known, other=unknown), 0.0)
    sin = tl.where(channels < HALF, -sin, sin)
    turned = tl.where(is_turned[:, None], x * cos[None, :] + partner * sin[None, :], given).to(out.dtype.element_ty)
    to_query = out + (token * NUM_HEADS + ids[:, None]) * HEAD_SIZE + channels[None, :]
    tl.store(to_query, turned, mask=is_query[:, None] & mask)
    own = ids - NUM_HEADS
    if BLOCK_SIZE == 0:
        to_key = out_key + (token * NUM_KV_HEADS + own[:, None]) * HEAD_SIZE + channels[None, :]
        tl.store(to_key, turned, mask=((own >= 0) & is_turned)[:, None] & mask)
    else:
        slot = tl.load(slots + token).to(tl.int64) + tl.zeros_like(own)  # [tile]
        is_key = (own >= 0) & is_turned & (slot >= 0)
        store_vectors(
            turned, data, scales, slot, own, 0, is_key, block_stride, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, BLOCK_D
        )
        own -= NUM_KV_HEADS
        is_value = (own >= 0) & (own < NUM_KV_HEADS) & (slot >= 0)
        store_vectors(
            turned, data, scales, slot, own, 1, is_value, block_stride, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, BLOCK_D
        )

"""The paged KV cache as Triton kernels see it, and the kernel that writes it.

One block holds [2 (keys, values), KV heads, block_size, head_size]: what a program reads of a block, the keys or values
of one head, is contiguous. With 8 bits, the values (e4m3) are followed by a float32 scale for each token and head:
[2, KV heads, block_size]. A stored value times its scale is the key or value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from interlace.plugins.triton.attention_parts import UNSPECIALISED
from interlace.plugins.triton.runtime import is_interpreted, launch

FP8_MAX = tl.constexpr(448.0)
"""The largest e4m3 number."""
_SCALE_BYTES = 4


class CacheView(NamedTuple):
    """A layer's cache tensor cut into what kernels take."""

    data: torch.Tensor
    """Keys and values, from the first block on; flat."""
    scales: torch.Tensor | None
    """With 8 bits: float32, from the first block's scales on; flat."""
    block_stride: int
    """Elements of `data` from one block to the next; a fourth of it in `scales`."""


def block_bytes(num_kv_heads: int, block_size: int, head_size: int, is_fp8: bool, itemsize: int) -> int:
    """Bytes of one block of one layer."""
    vectors = 2 * num_kv_heads * block_size
    return vectors * (head_size + _SCALE_BYTES) if is_fp8 else vectors * head_size * itemsize


def view_cache(cache: torch.Tensor, num_kv_heads: int, block_size: int, head_size: int, is_fp8: bool) -> CacheView:
    """Cut `cache` [blocks, ...], contiguous, of whatever shape its bytes have."""
    block_stride = cache.numel() // max(1, cache.shape[0])
    flat = cache.view(-1)
    if not is_fp8:
        return CacheView(flat, None, block_stride)
    first_scale = 2 * num_kv_heads * block_size * head_size // _SCALE_BYTES
    return CacheView(flat.view(torch.float8_e4m3fn), flat.view(torch.float32)[first_scale:], block_stride)


@triton.jit
def round_to_fp8(x):
    """float32 to the nearest number with the three fraction bits of e4m3, ties to even. The conversion that follows
    does the same on a GPU; Triton's interpreter loses the carry where the fraction rounds up to one."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def store_vectors(
    x, data, scales, slots, heads, part, is_row, block_stride,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keep vectors `x` [rows, BLOCK_D], each of the KV head `heads` [rows] in slot `slots` [rows] int64, where `is_row`
    [rows]; `part` 0: keys, 1: values."""
    channels = tl.arange(0, BLOCK_D)
    block = slots // BLOCK_SIZE
    vectors = (part * NUM_KV_HEADS + heads) * BLOCK_SIZE + slots % BLOCK_SIZE  # [rows], places in the block
    mask = is_row[:, None] & (channels < HEAD_SIZE)[None, :]
    places = (block * block_stride + vectors * HEAD_SIZE)[:, None] + channels[None, :]
    if scales is not None:
        wide = tl.where(mask, x.to(tl.float32), 0.0)
        largest = tl.max(tl.abs(wide), 1)
        scale = tl.where(largest > 0.0, largest / FP8_MAX, 1.0)
        tl.store(scales + block * (block_stride // 4) + vectors, scale, mask=is_row)
        x = round_to_fp8(tl.clamp(wide / scale[:, None], -FP8_MAX, FP8_MAX))
    tl.store(data + places, x.to(data.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def write_kv_kernel(
    key, value, data, scales, slots, num_tokens,
    key_stride, key_head_stride, value_stride, value_head_stride, block_stride,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program keeps TOKENS tokens. A negative slot is of a token that only fills up a batch."""
    rows, channels = tl.arange(0, TOKENS * BLOCK_H), tl.arange(0, BLOCK_D)
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + rows // BLOCK_H
    heads = rows % BLOCK_H
    slot = tl.load(slots + tokens, mask=tokens < num_tokens, other=-1)
    is_row = (slot >= 0) & (heads < NUM_KV_HEADS)
    mask = is_row[:, None] & (channels < HEAD_SIZE)[None, :]
    from_key = (tokens * key_stride + heads * key_head_stride)[:, None] + channels[None, :]
    k = tl.load(key + from_key, mask=mask, other=0.0)
    store_vectors(k, data, scales, slot, heads, 0, is_row, block_stride, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, BLOCK_D)
    from_value = (tokens * value_stride + heads * value_head_stride)[:, None] + channels[None, :]
    v = tl.load(value + from_value, mask=mask, other=0.0)
    store_vectors(v, data, scales, slot, heads, 1, is_row, block_stride, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, BLOCK_D)


def write_kv(key: torch.Tensor, value: torch.Tensor, view: CacheView, slots: torch.Tensor, block_size: int) -> None:
    """Keep `key`, `value` [tokens, kv_heads, head_size] at `slots` [tokens] int64 of the cache; negative: nowhere."""
    tokens, num_kv_heads, head_size = key.shape
    constants = write_constants(num_kv_heads, block_size, head_size, is_interpreted())
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    strides = (*key.stride()[:2], *value.stride()[:2], view.block_stride)
    grid = (-(-tokens // constants["TOKENS"]),)
    launch(write_kv_kernel, grid, key, value, view.data, view.scales, slots, tokens, *strides, **constants)


def write_constants(num_kv_heads: int, block_size: int, head_size: int, interpreted: bool = False) -> dict[str, Any]:
    """Compile-time arguments of `write_kv_kernel`. The interpreter pays per program, not per value."""
    block_h, block_d = triton.next_power_of_2(num_kv_heads), triton.next_power_of_2(head_size)
    tokens = max(1, (65536 if interpreted else 2048) // (block_h * block_d))
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "BLOCK_SIZE": block_size,
        "HEAD_SIZE": head_size,
        "TOKENS": triton.next_power_of_2(tokens),
        "BLOCK_H": block_h,
        "BLOCK_D": block_d,
        "num_warps": 4,
    }

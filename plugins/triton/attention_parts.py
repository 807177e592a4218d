"""Parts of the attention kernels: which keys a program reads, how scores are made of them, and how a sum goes on.

A program works on one piece of a sequence: some tokens next to each other, and of each the query heads that share a KV
head. These (token, head) pairs are the rows of its matrices: row r is token r // GROUP, head r % GROUP. A piece is
given by four numbers: the row of the block table, the place of its first token in the batch, how many tokens it has, and
how many tokens the sequence has up to and including its last one.

The softmax is computed piece by piece over tiles of keys (online softmax: Milakov and Gimelshein 2018; FlashAttention,
Dao et al. 2022), with powers of two instead of e. Keys lie in tiles by their position in the sequence, so a row goes
through the same tiles whatever else is in the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

MIN_SPLIT = 128
"""Fewest keys of a split. A multiple of every tile."""
SPLIT_STEP = 1024
"""The size of splits changes at multiples of this many keys only."""
_MIN_SPLIT = tl.constexpr(MIN_SPLIT)
_SHORT = tl.constexpr(SPLIT_STEP)


@triton.jit
def tanh(x):
    """Exact to about 1e-7 absolute; right for all x, infinities included."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def split_size(span, MAX_SPLITS: tl.constexpr):
    """Keys per split for a sequence that sees `span` keys: a power of two, so that there are at most `MAX_SPLITS` (and
    one more where a window begins within a split).

    It depends on nothing but the span: neither on the batch nor on the device, so nor do the sums."""
    size = tl.where(span > _SHORT, _MIN_SPLIT * 2, _MIN_SPLIT)
    for _ in tl.static_range(16):
        size = tl.where(span > size * MAX_SPLITS, size * 2, size)
    return size


@triton.jit
def splits_of(count, seq_len, WINDOW: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """(keys per split, number of the first split, splits, first key seen) of a piece of `count` tokens."""
    first = 0
    span = seq_len
    if WINDOW > 0:
        first = tl.maximum(seq_len - count - WINDOW + 1, 0)
        span = tl.minimum(seq_len, WINDOW)
    size = split_size(span, MAX_SPLITS)
    first_split = first // size
    return size, first_split, tl.cdiv(seq_len, size) - first_split, first


@triton.jit
def locate_tile(
    table, tile, seq_len,
    TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """(positions [TILE], block [TILE] or scalar int64, offset in the block [TILE]) of tile number `tile`."""
    positions = tile * TILE + tl.arange(0, TILE)
    if BLOCK_SIZE >= TILE:  # a tile lies within one block
        block = tl.load(table + tile * TILE // BLOCK_SIZE).to(tl.int64)
        offset = tile * TILE % BLOCK_SIZE + tl.arange(0, TILE)
    else:
        block = tl.load(table + positions // BLOCK_SIZE, mask=positions < seq_len, other=0).to(tl.int64)
        offset = positions % BLOCK_SIZE
    return positions, block, offset


@triton.jit
def load_vectors(
    data, scales, block, offset, part, head, is_read, block_stride,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys (`part` 0) or values (1) of one head, [TILE, BLOCK_D] in DTYPE, and their scales [TILE] (or None).

    What is not to be read is 0: the cache holds anything where nothing was written, and 0 * NaN would be NaN.
    `is_read` [TILE]; None: all."""
    channels = tl.arange(0, BLOCK_D)
    vectors = (part * NUM_KV_HEADS + head) * BLOCK_SIZE + offset  # [TILE], places in the block
    places = block * block_stride + vectors * HEAD_SIZE
    places = places[:, None] + channels[None, :]
    if BLOCK_D == HEAD_SIZE:
        if is_read is None:
            x = tl.load(data + places)
        else:
            x = tl.load(data + places, mask=is_read[:, None], other=0.0)
    elif is_read is None:
        x = tl.load(data + places, mask=(channels < HEAD_SIZE)[None, :], other=0.0)
    else:
        x = tl.load(data + places, mask=is_read[:, None] & (channels < HEAD_SIZE)[None, :], other=0.0)
    if scales is None:
        scale = None
    elif is_read is None:
        scale = tl.load(scales + block * (block_stride // 4) + vectors)
    else:
        scale = tl.load(scales + block * (block_stride // 4) + vectors, mask=is_read, other=0.0)
    return x.to(DTYPE), scale


@triton.jit
def softmax_step(
    q, row_positions, data, scales, positions, block, offset, head, first, seq_len, peak, total, acc,
    block_stride, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys goes into the sums: the new (peak [rows], total [rows], acc [rows, BLOCK_D]).

    q [rows, BLOCK_D]; `row_positions` [rows]: the position of each row's token. Not `MASKED`: every row sees every key.
    """
    is_read = None
    if MASKED:
        is_read = (positions >= first) & (positions < seq_len)  # [TILE]
    k, k_scale = load_vectors(
        data, scales, block, offset, 0, head, is_read, block_stride,
        NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, BLOCK_D, q.dtype,
    )  # fmt: skip
    v, v_scale = load_vectors(
        data, scales, block, offset, 1, head, is_read, block_stride,
        NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, BLOCK_D, q.dtype,
    )  # fmt: skip
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [rows, TILE] float32
    if scales is not None:
        scores = scores * k_scale[None, :]
    if SOFTCAP:
        scores = softcap * tanh(scores * (scale / softcap)) * LOG2E
    else:
        scores = scores * (scale * LOG2E)
    if MASKED:
        seen = positions[None, :] <= row_positions[:, None]
        if WINDOW > 0:
            seen = seen & (positions[None, :] > row_positions[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # -inf - -inf would be NaN: a row that saw nothing yet
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(peak - shift)
    total = total * fade + tl.sum(weights, 1)
    if scales is not None:
        weights = weights * v_scale[None, :]
    acc = tl.dot(weights.to(q.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return new_peak, total, acc

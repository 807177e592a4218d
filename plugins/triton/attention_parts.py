"""Parts of the attention kernels: which keys a program reads, how scores are made of them, and how a sum goes on.

A program works on one piece of a sequence: some tokens next to each other, and of each the query heads that share a
KV head. These (token, head) pairs are the rows of its matrices: row r is token r // GROUP, head r % GROUP. A piece is
given by four numbers: the row of the block table, the place of its first token in the batch, how many tokens it has,
and how many tokens the sequence has up to and including its last one.

The softmax is computed piece by piece over tiles of keys (online softmax: Milakov and Gimelshein 2018; FlashAttention,
Dao et al. 2022), with powers of two instead of e. Keys lie in tiles by their position in the sequence, so a row goes
through the same tiles whatever else is in the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNSPECIALISED = ("tables", "table_rows", "starts", "counts", "seq_lens", "table_stride", "slots", "num_tokens")
"""Arguments that Triton must not look at: it compiles a kernel anew where an address or a number is a multiple of 16,
or 1, and was not before. These change from step to step, and nothing is gained."""

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
def load_blocks(table, tile, seq_len, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Which blocks hold tile number `tile`: int64, a scalar where a tile lies within one block, else [TILE]. Beyond the
    sequence some block of it.

    Loops ask for the next tile's blocks before they work on a tile. Asked for when they are needed, the table would be
    a second stage in front of the loads of keys, and Triton would run those half as far ahead."""
    last = (seq_len - 1) // BLOCK_SIZE
    if BLOCK_SIZE >= TILE:
        return tl.load(table + tl.minimum(tile * TILE // BLOCK_SIZE, last)).to(tl.int64)
    else:
        positions = tile * TILE + tl.arange(0, TILE)
        return tl.load(table + tl.minimum(positions // BLOCK_SIZE, last)).to(tl.int64)


@triton.jit
def offsets_of(tile, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """[TILE]: where in its block each key of the tile lies."""
    if BLOCK_SIZE >= TILE:
        return tile * TILE % BLOCK_SIZE + tl.arange(0, TILE)
    else:
        return (tile * TILE + tl.arange(0, TILE)) % BLOCK_SIZE


@triton.jit
def load_vectors(
    data, base, vectors, is_read,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """[TILE, BLOCK_D] in DTYPE: vectors number `vectors` [TILE] of the block (or blocks) that begin at `base`.

    `MASKED`: what is not `is_read` [TILE] is 0: the cache holds anything where nothing was written, and 0 * NaN would
    be NaN."""
    channels = tl.arange(0, BLOCK_D)
    places = data + (base + vectors * HEAD_SIZE)[:, None] + channels[None, :]
    if BLOCK_D == HEAD_SIZE:
        if MASKED:
            x = tl.load(places, mask=is_read[:, None], other=0.0)
        else:
            x = tl.load(places)
    else:
        x = tl.load(places, mask=is_read[:, None] & (channels < HEAD_SIZE)[None, :], other=0.0)
    return x.to(DTYPE)


@triton.jit
def nothing_yet(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(peak [ROWS], total [ROWS], acc [ROWS, BLOCK_D]) before the first key."""
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    return peak, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK_D], tl.float32)


@triton.jit
def softmax_step(
    q, row_positions, data, scales, tile, block, head, first, seq_len, peak, total, acc,
    block_stride, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile number `tile`, which lies in `block`, goes into the sums: the new (peak [rows], total [rows], acc [rows,
    BLOCK_D]).

    q [rows, BLOCK_D]; `row_positions` [rows]: the position of each row's token. Not `MASKED`: every row sees every key.
    """
    positions = tile * TILE + tl.arange(0, TILE)
    is_read = (positions >= first) & (positions < seq_len)  # [TILE]
    keys = head * BLOCK_SIZE + offsets_of(tile, TILE, BLOCK_SIZE)  # [TILE], places in the block
    values = keys + NUM_KV_HEADS * BLOCK_SIZE
    k = load_vectors(data, block * block_stride, keys, is_read, HEAD_SIZE, BLOCK_D, MASKED, q.dtype)
    v = load_vectors(data, block * block_stride, values, is_read, HEAD_SIZE, BLOCK_D, MASKED, q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [rows, TILE] float32
    if scales is not None:
        base = scales + block * (block_stride // 4)
        scores = scores * tl.load(base + keys, mask=is_read, other=0.0)[None, :]
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
        weights = weights * tl.load(base + values, mask=is_read, other=0.0)[None, :]
    acc = tl.dot(weights.to(q.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return new_peak, total, acc

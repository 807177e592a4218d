"""Attention for few query tokens per sequence over a paged cache: decoding, and verifying a draft.

The keys of a sequence are cut into splits (flash decoding: Dao et al. 2023). How is decided by `split_size`, from the
length of the sequence alone. A split is summed on its own and a second kernel adds the splits up in their order, so
the result of a row has the same bits whatever is launched with it. What does follow from the batch is only which
program runs which splits: `lanes` programs share those of a piece.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from interlace.plugins.triton.attention_parts import (
    UNSPECIALISED,
    load_blocks,
    nothing_yet,
    softmax_step,
    splits_of,
)

MERGED_AT_ONCE = 8
"""Splits that the second kernel reads at a time."""


class Pieces(NamedTuple):
    """What programs work on, see attention_parts; each [pieces] int32."""

    table_rows: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    seq_lens: torch.Tensor


@triton.jit(do_not_specialize=UNSPECIALISED)
def decode_kernel(
    query, data, scales, tables, table_rows, starts, counts, seq_lens, out, part_acc, part_peak, part_total,
    query_stride, query_head_stride, out_stride, block_stride, table_stride, slots, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, COUNT: tl.constexpr, ALIGN: tl.constexpr, MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (piece, KV head, lane) sums splits lane, lane + lanes, … of its piece, which has at most COUNT tokens.
    A token's rows begin at its position modulo ALIGN.

    Partial sums lie at [piece, split, token of the piece, head]; `slots` splits have room. A piece with a single split
    is finished here. The splits of a lane are one loop, so that loads run ahead across their borders."""
    piece, head, lane = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lanes = tl.num_programs(2)
    count, seq_len = tl.load(counts + piece), tl.load(seq_lens + piece)
    size, first_split, splits, first = splits_of(count, seq_len, WINDOW, MAX_SPLITS)
    if lane >= splits:
        return
    start = tl.load(starts + piece).to(tl.int64)
    table = tables + tl.load(table_rows + piece).to(tl.int64) * table_stride
    rows, channels = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    tokens, heads = rows // GROUP - (seq_len - count) % ALIGN, head * GROUP + rows % GROUP
    is_row = (tokens >= 0) & (tokens < count)
    row_positions = tl.where(is_row, seq_len - count + tokens, seq_len - 1)
    mask = is_row[:, None] & (channels < HEAD_SIZE)[None, :]
    from_query = (start + tokens)[:, None] * query_stride + heads[:, None] * query_head_stride + channels[None, :]
    q = tl.load(query + from_query, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]

    peak, total, acc = nothing_yet(BLOCK_M, BLOCK_D)
    per_split = size // TILE
    own = (splits - lane + lanes - 1) // lanes
    skipped = tl.where(lane == 0, first // TILE - first_split * per_split, 0)
    end = own * per_split
    if lane + (own - 1) * lanes == splits - 1:  # the last split may be short
        end -= (first_split + splits) * per_split - tl.cdiv(seq_len, TILE)
    next_tile = (first_split + lane) * per_split + skipped
    next_block = load_blocks(table, next_tile, seq_len, TILE, BLOCK_SIZE)
    for i in range(skipped, end):
        tile, block = next_tile, next_block
        next_tile = (first_split + lane + (i + 1) // per_split * lanes) * per_split + (i + 1) % per_split
        next_block = load_blocks(table, next_tile, seq_len, TILE, BLOCK_SIZE)
        peak, total, acc = softmax_step(
            q, row_positions, data, scales, tile, block, head, first, seq_len, peak, total, acc,
            block_stride, scale, softcap,
            NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, BLOCK_D, TILE, WINDOW, SOFTCAP, True, PRECISION,
        )  # fmt: skip
        if i % per_split == per_split - 1 or i == end - 1:
            if splits == 1:
                to_out = (start + tokens)[:, None] * out_stride + (heads * HEAD_SIZE)[:, None] + channels[None, :]
                tl.store(out + to_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
            else:
                split = lane + i // per_split * lanes
                place = (piece.to(tl.int64) * slots + split) * COUNT + tokens
                place = place * (NUM_KV_HEADS * GROUP) + heads
                tl.store(part_acc + place[:, None] * HEAD_SIZE + channels[None, :], acc, mask=mask)
                tl.store(part_peak + place, peak, mask=is_row)
                tl.store(part_total + place, total, mask=is_row)
            peak, total, acc = nothing_yet(BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALISED)
def merge_kernel(
    starts, counts, seq_lens, out, part_acc, part_peak, part_total, out_stride, slots,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, WINDOW: tl.constexpr, COUNT: tl.constexpr,
    MAX_SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (token of a piece, head) adds up the splits, in their order."""
    piece, token = tl.program_id(0) // COUNT, tl.program_id(0) % COUNT
    head = tl.program_id(1)
    count, seq_len = tl.load(counts + piece), tl.load(seq_lens + piece)
    _, _, splits, _ = splits_of(count, seq_len, WINDOW, MAX_SPLITS)
    if token >= count or splits == 1:
        return
    channels, chunk = tl.arange(0, BLOCK_D), tl.arange(0, CHUNK)
    is_channel = channels < HEAD_SIZE
    base = (piece.to(tl.int64) * slots * COUNT + token) * NUM_HEADS + head
    peak = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, splits, CHUNK):
        places = base + (begin + chunk).to(tl.int64) * (COUNT * NUM_HEADS)
        is_split = begin + chunk < splits
        peaks = tl.load(part_peak + places, mask=is_split, other=float("-inf"))
        totals = tl.load(part_total + places, mask=is_split, other=0.0)
        mask = is_split[:, None] & is_channel[None, :]
        accs = tl.load(part_acc + places[:, None] * HEAD_SIZE + channels[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights, fade = tl.exp2(peaks - shift), tl.exp2(peak - shift)
        total = total * fade + tl.sum(totals * weights, 0)
        acc = acc * fade + tl.sum(accs * weights[:, None], 0)
        peak = new_peak
    start = tl.load(starts + piece).to(tl.int64)
    to_out = (start + token) * out_stride + head * HEAD_SIZE + channels
    tl.store(out + to_out, (acc / total).to(out.dtype.element_ty), mask=is_channel)

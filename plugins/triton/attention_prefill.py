"""Attention for many query tokens per sequence over a paged cache: prompts, whole or in chunks, after any context.

One program walks all keys that its piece sees. Tiles that every row sees in full go without masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from interlace.plugins.triton.attention_parts import UNSPECIALISED, load_blocks, nothing_yet, softmax_step


@triton.jit
def _walk(
    q, row_positions, data, scales, table, head, first, seq_len, begin, end, peak, total, acc,
    block_stride, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles `begin` to `end` go into the sums."""
    next_block = load_blocks(table, begin, seq_len, TILE, BLOCK_SIZE)
    for tile in range(begin, end):
        block = next_block
        next_block = load_blocks(table, tile + 1, seq_len, TILE, BLOCK_SIZE)
        peak, total, acc = softmax_step(
            q, row_positions, data, scales, tile, block, head, first, seq_len, peak, total, acc,
            block_stride, scale, softcap,
            NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, BLOCK_D, TILE, WINDOW, SOFTCAP, MASKED, PRECISION,
        )  # fmt: skip
    return peak, total, acc


@triton.jit(do_not_specialize=UNSPECIALISED)
def prefill_kernel(
    query, data, scales, tables, table_rows, starts, counts, seq_lens, out,
    query_stride, query_head_stride, out_stride, block_stride, table_stride, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (piece, KV head); a piece has at most BLOCK_M // GROUP tokens."""
    piece, head = tl.program_id(0), tl.program_id(1)
    count, seq_len = tl.load(counts + piece), tl.load(seq_lens + piece)
    start = tl.load(starts + piece).to(tl.int64)
    table = tables + tl.load(table_rows + piece).to(tl.int64) * table_stride
    rows, channels = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    tokens, heads = rows // GROUP, head * GROUP + rows % GROUP
    is_row = tokens < count
    row_positions = tl.where(is_row, seq_len - count + tokens, seq_len - 1)
    mask = is_row[:, None] & (channels < HEAD_SIZE)[None, :]
    from_query = (start + tokens)[:, None] * query_stride + heads[:, None] * query_head_stride + channels[None, :]
    q = tl.load(query + from_query, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]

    peak, total, acc = nothing_yet(BLOCK_M, BLOCK_D)
    # The first token sees the fewest keys at the end, the last one the fewest at the beginning.
    end, end_whole = tl.cdiv(seq_len, TILE), (seq_len - count + 1) // TILE
    first = 0
    begin_whole = 0
    if WINDOW > 0:
        first = tl.maximum(seq_len - count - WINDOW + 1, 0)
        begin_whole = tl.minimum(tl.cdiv(tl.maximum(seq_len - WINDOW, 0), TILE), end)
        peak, total, acc = _walk(
            q, row_positions, data, scales, table, head, first, seq_len, first // TILE, begin_whole, peak, total, acc,
            block_stride, scale, softcap,
            NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, BLOCK_D, TILE, WINDOW, SOFTCAP, True, PRECISION,
        )  # fmt: skip
        end_whole = tl.maximum(end_whole, begin_whole)
    peak, total, acc = _walk(
        q, row_positions, data, scales, table, head, first, seq_len, begin_whole, end_whole, peak, total, acc,
        block_stride, scale, softcap,
        NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, BLOCK_D, TILE, WINDOW, SOFTCAP, False, PRECISION,
    )  # fmt: skip
    peak, total, acc = _walk(
        q, row_positions, data, scales, table, head, first, seq_len, end_whole, end, peak, total, acc,
        block_stride, scale, softcap,
        NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, BLOCK_D, TILE, WINDOW, SOFTCAP, True, PRECISION,
    )  # fmt: skip
    to_out = (start + tokens)[:, None] * out_stride + (heads * HEAD_SIZE)[:, None] + channels[None, :]
    tl.store(out + to_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)

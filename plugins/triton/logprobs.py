"""Log probabilities of tokens on the device, without the host, and without a normalised copy of the logits.

Two launches: `read_parts` reads every logit once and finds, per part of a row, its largest value, the sum of its
exponentials, how many tokens are above the chosen one, and its own most likely tokens; `report_rows` puts the parts of
a row together. A row is cut into parts by its length alone and they are added up in one order, so its bits do not
depend on other rows. Of equally likely tokens the first come first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from interlace.plugins.triton.runtime import launch
from interlace.plugins.triton.sampling import PART
from interlace.plugins.triton.weights import order, pack, value_of
from interlace.sampling.device import LogprobColumns
from interlace.sampling.params import MAX_LOGPROBS

_BEYOND = tl.constexpr((1 << 63) - 1)
"""More than any token that is packed with its logit."""


def logprobs(logits: torch.Tensor, token_ids: torch.Tensor, counts: torch.Tensor) -> LogprobColumns:
    """`Kernels.logprobs`, for logits of any floating type with a dense last dimension."""
    rows, vocab = logits.shape
    parts, most = triton.cdiv(vocab, PART), min(MAX_LOGPROBS, vocab)

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty((rows, *shape), dtype=dtype, device=logits.device)

    found = LogprobColumns(empty(torch.int64, 1 + most), empty(torch.float32, 1 + most), empty(torch.int64))
    given = (logits, token_ids, counts)
    own = (empty(torch.float32, parts), empty(torch.float32, parts), empty(torch.int32, parts))
    best = empty(torch.int64, parts, most)
    launch(read_parts, (rows, parts), *given, *own, best, vocab, logits.stride(0), **parts_constants(most))
    launch(report_rows, (rows,), *given, *own, best, *found, logits.stride(0), parts, **rows_constants(vocab, most))
    return found


def parts_constants(most: int) -> dict[str, Any]:
    """Compile-time arguments of `read_parts`."""
    return {"PART": PART, "MOST": most, "num_warps": 8}


def rows_constants(vocab: int, most: int) -> dict[str, Any]:
    """Compile-time arguments of `report_rows`."""
    parts = triton.next_power_of_2(triton.cdiv(vocab, PART))
    return {"MOST": most, "PARTS": parts, "LISTED": triton.next_power_of_2(most), "num_warps": 4}


@triton.jit
def _chosen(logits_ptr, token_ids_ptr, row, row_stride):
    """(token, its logit); of a row that failed, those of token 0."""
    token = tl.maximum(tl.load(token_ids_ptr + row), 0)
    return token, tl.load(logits_ptr + row * row_stride + token).to(tl.float32)


@triton.jit
def read_parts(
    logits_ptr, token_ids_ptr, counts_ptr, peaks_ptr, sums_ptr, above_ptr, best_ptr, vocab, row_stride,
    PART: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Per part [rows, parts]: peaks, sums of exp(logit - peak), tokens above the chosen one; best [rows, parts, MOST]
    packed, as many as the row asks for, -1 where the part has no more."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(counts_ptr + row)
    if count < 0:
        return
    _, chosen = _chosen(logits_ptr, token_ids_ptr, row, row_stride)
    ids = part * PART + tl.arange(0, PART)
    x = tl.load(logits_ptr + row * row_stride + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    peak = tl.max(x, axis=0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    place = row * tl.num_programs(1) + part
    tl.store(peaks_ptr + place, peak)
    tl.store(sums_ptr + place, tl.sum(tl.exp(x - shift), axis=0))
    tl.store(above_ptr + place, tl.sum((x > chosen).to(tl.int32), axis=0))
    keys = tl.where(ids < vocab, pack(order(x), ids), -1)
    last = tl.full((), _BEYOND, tl.int64)
    for index in range(tl.minimum(count, MOST)):
        last = tl.max(tl.where(keys < last, keys, -1), axis=0)
        tl.store(best_ptr + place * MOST + index, last)


@triton.jit
def report_rows(
    logits_ptr, token_ids_ptr, counts_ptr, peaks_ptr, sums_ptr, above_ptr, best_ptr, ids_ptr, values_ptr, ranks_ptr,
    row_stride, parts,
    MOST: tl.constexpr, PARTS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """ids, values [rows, 1 + MOST]: the chosen token, then the most likely ones; ranks [rows]."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(counts_ptr + row), MOST)
    if count < 0:
        return
    token, chosen = _chosen(logits_ptr, token_ids_ptr, row, row_stride)
    places, columns = tl.arange(0, PARTS), tl.arange(0, LISTED)
    is_part = places < parts
    from_part = row * parts + places
    peaks = tl.load(peaks_ptr + from_part, mask=is_part, other=float("-inf"))
    peak = tl.max(peaks, axis=0)
    sums = tl.load(sums_ptr + from_part, mask=is_part, other=0.0) * tl.exp(peaks - peak)
    norm = tl.log(tl.sum(sums, axis=0).to(tl.float64)).to(tl.float32)
    above = tl.sum(tl.load(above_ptr + from_part, mask=is_part, other=0), axis=0)
    tl.store(ranks_ptr + row, (above + 1).to(tl.int64))
    to_ids, to_values = ids_ptr + row * (1 + MOST), values_ptr + row * (1 + MOST)
    tl.store(to_ids, token)
    tl.store(to_values, chosen - peak - norm)
    is_listed = is_part[:, None] & (columns < count)[None, :]
    keys = tl.load(best_ptr + from_part[:, None] * MOST + columns[None, :], mask=is_listed, other=-1)
    last = tl.full((), _BEYOND, tl.int64)
    for index in range(count):
        last = tl.max(tl.where(keys < last, keys, -1))
        tl.store(to_ids + 1 + index, 0x7FFFFFFF - (last & 0x7FFFFFFF))
        tl.store(to_values + 1 + index, value_of((last >> 31).to(tl.uint32)) - peak - norm)

"""Sampling on the device: nothing is sorted, nothing waits for the host, and no result depends on the order of sums.

A token's weight is exp(logit - largest logit) as an integer multiple of 2^-44, so sums are exact whatever is added
first: however a row is cut into parts, and whatever the other rows are, it gives the same token. The steps, each over
all rows at once:

1. `find_peaks`    per part of a row its best token, and the peaks of its runs of 64 tokens;
2. `plan_rows`     per row the best token, which is all that greedy rows need, and a logit above which enough tokens lie
                    to cover top_k or, as a rule, top_p: as many runs have such a peak as tokens are wanted;
3. `weigh_parts`   per part the sum of its weights, and a list of the tokens above that logit;
4. `draw_rows`      per row the thresholds of top_k and top_p, bit by bit by bisection over the lists (or over the whole
                    row where they are too long, or the nucleus reaches beyond them), then the token.

The distribution is that of `interlace.sampling.distribution`, the numbers those of `interlace.sampling.random`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from interlace.plugins.triton.drawing import draw_rows
from interlace.plugins.triton.runtime import launch
from interlace.plugins.triton.weights import bit, divisor_of, fixed, load_scaled, order, pack, value_of
from interlace.sampling.device import SamplingColumns, SamplingMode

PART = 4096
"""Tokens of a row that one program reads."""
RUN = 64
"""Tokens whose peak is kept."""
_LISTED = 8192
"""Listed tokens of a row, in all; at most."""
_MOST_LISTED = 1024
"""The same for one part."""
_NUCLEUS = tl.constexpr(512)
"""Tokens, at least, that are listed for top_p; a nucleus that reaches beyond them is looked for in the whole row."""


def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the first index of the largest value, that value) of each row of [rows, vocab] float32 with a dense last
    dimension; NaN counts as the largest. [rows] int64 and float32, on the device."""
    return _best(logits, only_finite=False)


def sample(logits: torch.Tensor, columns: SamplingColumns, mode: SamplingMode) -> torch.Tensor:
    """`Kernels.sample`, for logits with a dense last dimension."""
    if mode is SamplingMode.GREEDY:
        return _best(logits, only_finite=True)[0]
    return _draw(logits, columns, None, mode is SamplingMode.TRUNCATED)


def draw(logits: torch.Tensor, columns: SamplingColumns, uniforms: torch.Tensor) -> torch.Tensor:
    """The same with given numbers, [rows] float64, instead of those of seed, sample index and position."""
    return _draw(logits, columns, uniforms, True)


def _best(logits: torch.Tensor, only_finite: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, PART)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    peaks = torch.empty(rows, dtype=torch.float32, device=logits.device)
    best = torch.empty((rows, parts), dtype=torch.int64, device=logits.device)
    launch(find_peaks, (rows, parts), logits, peaks, best, peaks, vocab, logits.stride(0), **peaks_constants(0))
    constants = {"PARTS": triton.next_power_of_2(parts), "ONLY_FINITE": only_finite, "num_warps": 1}
    launch(pick_best, (rows,), best, tokens, peaks, parts, **constants)
    return tokens, peaks


def _draw(
    logits: torch.Tensor, columns: SamplingColumns, uniforms: torch.Tensor | None, truncated: bool
) -> torch.Tensor:
    rows, vocab = logits.shape
    parts, runs = triton.cdiv(vocab, PART), triton.cdiv(vocab, RUN) if truncated else 0
    sizes = list_sizes(vocab)

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty((rows, *shape), dtype=dtype, device=logits.device)

    tokens, state = empty(torch.int64), empty(torch.float32, 3)
    best, masses = empty(torch.int64, parts), empty(torch.int64, parts)
    run_peaks = empty(torch.float32, max(runs, 1))
    counts = empty(torch.int32, parts) if truncated else masses
    lists = empty(torch.float32, sizes["PARTS"], sizes["LISTED"]) if truncated else state
    numbers = empty(torch.float64) if uniforms is None else uniforms
    row = (logits, columns.temperature)
    size = (vocab, logits.stride(0))
    launch(find_peaks, (rows, parts), *row, best, run_peaks, *size, **peaks_constants(runs))
    own = (columns.seed, columns.sample_index, columns.position)
    shape = (columns.top_k, columns.top_p, columns.min_p)
    launch(
        plan_rows,
        (rows,),
        *(best, run_peaks, columns.temperature, *shape, *own, tokens, state, numbers, vocab, parts, runs),
        **plan_constants(vocab, truncated, seeded=uniforms is None),
    )
    launch(
        weigh_parts, (rows, parts), *row, state, masses, counts, lists, *size, TRUNCATED=truncated, PART=PART, **sizes,
        num_warps=8,
    )  # fmt: skip
    launch(
        draw_rows,
        (rows,),
        *(*row, columns.top_k, columns.top_p, numbers, state, masses, counts, lists, tokens, *size, parts),
        TRUNCATED=truncated,
        PART=PART,
        **sizes,
        num_warps=16,
    )
    return tokens


def list_sizes(vocab: int) -> dict[str, int]:
    """Parts of a row as a power of two, and how many tokens each may list."""
    parts = triton.next_power_of_2(triton.cdiv(vocab, PART))
    return {"PARTS": parts, "LISTED": max(1, min(_MOST_LISTED, _LISTED // parts))}


def peaks_constants(runs: int) -> dict[str, Any]:
    """Compile-time arguments of `find_peaks`; without `runs` it looks for the best tokens only."""
    return {"HAS_RUNS": runs > 0, "PART": PART, "RUN": RUN, "num_warps": 8}


def plan_constants(vocab: int, truncated: bool, seeded: bool) -> dict[str, Any]:
    """Compile-time arguments of `plan_rows`."""
    runs = triton.next_power_of_2(triton.cdiv(vocab, RUN))
    parts = triton.next_power_of_2(triton.cdiv(vocab, PART))
    return {"TRUNCATED": truncated, "SEEDED": seeded, "PARTS": parts, "RUNS": runs, "num_warps": 4}


@triton.jit
def find_peaks(
    logits_ptr,
    temperature_ptr,
    best_ptr,
    run_peaks_ptr,
    vocab,
    row_stride,
    HAS_RUNS: tl.constexpr,
    PART: tl.constexpr,
    RUN: tl.constexpr,
):
    """best [rows, parts] packed, of the logits; run_peaks [rows, runs] of the scaled logits."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = part * PART + tl.arange(0, PART)
    x = tl.load(logits_ptr + row * row_stride + ids, mask=ids < vocab, other=float("-inf"))
    tl.store(best_ptr + row * tl.num_programs(1) + part, tl.max(pack(order(x), ids), axis=0))
    if HAS_RUNS:
        keys = order(tl.div_rn(x, divisor_of(tl.load(temperature_ptr + row)) + tl.zeros_like(x)))
        peaks = value_of(tl.max(tl.reshape(keys, (PART // RUN, RUN)), axis=1))
        runs = part * (PART // RUN) + tl.arange(0, PART // RUN)
        count = tl.cdiv(vocab, RUN)
        tl.store(run_peaks_ptr + row * count + runs, peaks, mask=runs < count)


@triton.jit
def _best_of(best_ptr, row, parts, PARTS: tl.constexpr):
    """(token, key of its logit) of a row."""
    places = tl.arange(0, PARTS)
    best = tl.max(tl.load(best_ptr + row * parts + places, mask=places < parts, other=0), axis=0)
    return 0x7FFFFFFF - (best & 0x7FFFFFFF), (best >> 31).to(tl.uint32)


@triton.jit
def _is_finite(key):
    """Of a key of `order`."""
    return (key > 0x007FFFFF) & (key < 0xFF800000)


@triton.jit
def pick_best(best_ptr, tokens_ptr, peaks_ptr, parts, PARTS: tl.constexpr, ONLY_FINITE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token, key = _best_of(best_ptr, row, parts, PARTS)
    if ONLY_FINITE:
        token = tl.where(_is_finite(key), token, -1)
    tl.store(tokens_ptr + row, token)
    tl.store(peaks_ptr + row, value_of(key))


@triton.jit
def _uniform(seed, sample_index, position):
    """The number of `interlace.sampling.random.uniform`: Philox4x32-10, its words held in 64 bits."""
    c0, c2 = (position & 0xFFFFFFFF).to(tl.uint64), (sample_index & 0xFFFFFFFF).to(tl.uint64)
    c1, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint64), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint64)
    for _ in tl.static_range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (right >> 32) ^ c1 ^ k0, (left >> 32) ^ c3 ^ k1
        c1, c3 = right & 0xFFFFFFFF, left & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return (((c0 >> 5) << 26) | (c1 >> 6)).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def plan_rows(
    best_ptr,
    run_peaks_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    sample_index_ptr,
    position_ptr,
    tokens_ptr,
    state_ptr,
    uniforms_ptr,
    vocab,
    parts,
    runs,
    TRUNCATED: tl.constexpr,
    SEEDED: tl.constexpr,
    PARTS: tl.constexpr,
    RUNS: tl.constexpr,
):
    """tokens [rows]: the best ones, -1 where a row is no distribution. state [rows, 3]: the largest scaled logit (-inf:
    the row is done), the least that min_p leaves, the least that is listed (inf: there is nothing to cut)."""
    row = tl.program_id(0).to(tl.int64)
    token, key = _best_of(best_ptr, row, parts, PARTS)
    tl.store(tokens_ptr + row, tl.where(_is_finite(key), token, -1))
    temperature = tl.load(temperature_ptr + row)
    state = state_ptr + row * 3
    if SEEDED:
        own = _uniform(tl.load(seed_ptr + row), tl.load(sample_index_ptr + row), tl.load(position_ptr + row))
        tl.store(uniforms_ptr + row, own)
    if (temperature <= 0.0) | (_is_finite(key) == 0):
        tl.store(state, float("-inf"))
        return
    peak = tl.div_rn(value_of(key), divisor_of(temperature))
    floor = tl.full((), float("-inf"), tl.float32)
    least = tl.full((), float("inf"), tl.float32)
    if TRUNCATED:
        min_p = tl.load(min_p_ptr + row)
        margin = tl.log(tl.where(min_p > 0.0, min_p, 1.0).to(tl.float64)).to(tl.float32)
        floor = tl.where(min_p > 0.0, peak + margin, floor)
        top_k = tl.load(top_k_ptr + row)
        is_limited = (top_k > 0) & (top_k < vocab)
        if is_limited | (tl.load(top_p_ptr + row) < 1.0):
            wanted = tl.where(is_limited, top_k, _NUCLEUS)
            places = tl.arange(0, RUNS)
            keys = order(tl.load(run_peaks_ptr + row * runs + places, mask=places < runs, other=float("-inf")))
            found = tl.zeros((), tl.uint32)
            for index in range(32):
                trial = found | bit(index)
                found = tl.where(tl.sum((keys >= trial).to(tl.int32), axis=0) >= wanted, trial, found)
            least = tl.maximum(tl.where(wanted <= runs, value_of(found), float("-inf")), floor)
    tl.store(state, peak)
    tl.store(state + 1, floor)
    tl.store(state + 2, least)


@triton.jit
def weigh_parts(
    logits_ptr,
    temperature_ptr,
    state_ptr,
    masses_ptr,
    counts_ptr,
    lists_ptr,
    vocab,
    row_stride,
    TRUNCATED: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    LISTED: tl.constexpr,
):
    """masses [rows, parts]: sums of weights; counts, lists [rows, PARTS, LISTED]: scaled logits to cut, by id."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    peak = tl.load(state_ptr + row * 3)
    if peak == float("-inf"):
        return
    floor, least = tl.load(state_ptr + row * 3 + 1), tl.load(state_ptr + row * 3 + 2)
    ids = part * PART + tl.arange(0, PART)
    x = load_scaled(logits_ptr + row * row_stride, ids, vocab, divisor_of(tl.load(temperature_ptr + row)))
    weights = tl.exp(x - peak)
    place = row * tl.num_programs(1) + part
    tl.store(masses_ptr + place, tl.sum(tl.where(x >= floor, fixed(weights), 0), axis=0))
    if TRUNCATED:
        if least < float("inf"):
            # also what has the same weight as the least one: top_p treats equal weights alike
            is_listed = (x >= least) | ((weights >= tl.exp(least - peak)) & (x >= floor) & (weights > 0.0))
            is_listed = is_listed & (ids < vocab)
            targets = tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
            tl.store(counts_ptr + place, tl.sum(is_listed.to(tl.int32), axis=0))
            start = lists_ptr + (row * PARTS + part) * LISTED
            tl.store(start + targets, x, mask=is_listed & (targets < LISTED))

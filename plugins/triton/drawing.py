"""The last step of sampling on the device: thresholds of top_k and top_p, then the token. See `sampling`."""

from __future__ import annotations

import triton
import triton.language as tl

from interlace.plugins.triton.weights import bit, divisor_of, fixed, load_scaled, order


@triton.jit
def _nucleus_mass(top_p, total):
    """The mass a nucleus has to reach: a token is part of it if all more likely ones together have less."""
    share = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    return tl.where(top_p < 1.0, tl.minimum(tl.maximum(share, 1), total), total)


@triton.jit
def _bits(weights):
    """Weights in [0, 1] as uint32 in the same order."""
    return weights.to(tl.uint32, bitcast=True)


@triton.jit
def _kept(x, peak, floor, least_key, least_weight):
    """Fixed-point weights of scaled logits, 0 where excluded."""
    weights = tl.exp(x - peak)
    is_kept = (x >= floor) & (order(x) >= least_key) & (_bits(weights) >= least_weight)
    return tl.where(is_kept, fixed(weights), 0)


@triton.jit
def _least_key_in_row(row_ptr, vocab, divisor, wanted, parts, PART: tl.constexpr):
    """Key of the `wanted`-th largest scaled logit."""
    found = tl.zeros((), tl.uint32)
    for index in range(32):
        trial = found | bit(index)
        count = tl.zeros((PART,), tl.int32)
        for part in range(parts):
            x = load_scaled(row_ptr, part * PART + tl.arange(0, PART), vocab, divisor)
            count += (order(x) >= trial).to(tl.int32)
        found = tl.where(tl.sum(count, axis=0) >= wanted, trial, found)
    return found


@triton.jit
def _mass_in_row(row_ptr, vocab, divisor, peak, floor, least_key, least_weight, parts, PART: tl.constexpr):
    """Sum of the weights that are kept."""
    mass = tl.zeros((PART,), tl.int64)
    for part in range(parts):
        x = load_scaled(row_ptr, part * PART + tl.arange(0, PART), vocab, divisor)
        mass += _kept(x, peak, floor, least_key, least_weight)
    return tl.sum(mass, axis=0)


@triton.jit
def _cut_in_list(x, peak, top_k, top_p, is_limited, masses):
    """Thresholds from the listed logits x [parts, listed]: whether they are found here, the least key that top_k keeps,
    the bits of the least weight that top_p keeps, masses [parts] of what is kept."""
    keys = order(x)
    least_key = tl.zeros((), tl.uint32)
    if is_limited:
        for index in range(32):
            trial = least_key | bit(index)
            least_key = tl.where(tl.sum((keys >= trial).to(tl.int32)) >= top_k, trial, least_key)
    weights = tl.exp(x - peak)
    bits, own = _bits(weights), tl.where(keys >= least_key, fixed(weights), 0)
    mass = tl.sum(own)
    wanted = _nucleus_mass(top_p, tl.where(is_limited, mass, tl.sum(masses, axis=0)))
    least_weight = tl.zeros((), tl.uint32)
    if mass >= wanted:
        for index in range(1, 32):
            trial = least_weight | bit(index)
            heavy = tl.sum(tl.where(bits >= trial, own, 0))
            least_weight = tl.where(heavy >= wanted, trial, least_weight)
    return (
        (mass >= wanted).to(tl.int32),
        least_key,
        least_weight,
        tl.sum(tl.where(bits >= least_weight, own, 0), axis=1),
    )


@triton.jit
def _cut_in_row(row_ptr, vocab, divisor, peak, floor, top_k, top_p, is_limited, parts, PART: tl.constexpr,
                PARTS: tl.constexpr):  # fmt: skip
    """The same from the whole row, read anew for every bit."""
    least_key = tl.zeros((), tl.uint32)
    if is_limited:
        least_key = _least_key_in_row(row_ptr, vocab, divisor, top_k, parts, PART)
    least_weight = tl.zeros((), tl.uint32)
    wanted = _nucleus_mass(
        top_p, _mass_in_row(row_ptr, vocab, divisor, peak, floor, least_key, least_weight, parts, PART)
    )
    for index in range(1, 32):
        trial = least_weight | bit(index)
        heavy = _mass_in_row(row_ptr, vocab, divisor, peak, floor, least_key, trial, parts, PART)
        least_weight = tl.where(heavy >= wanted, trial, least_weight)
    masses = tl.zeros((PARTS,), tl.int64)
    for part in range(parts):
        x = load_scaled(row_ptr, part * PART + tl.arange(0, PART), vocab, divisor)
        own = tl.sum(_kept(x, peak, floor, least_key, least_weight), axis=0)
        masses = tl.where(tl.arange(0, PARTS) == part, own, masses)
    return least_key, least_weight, masses


@triton.jit
def draw_rows(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, uniforms_ptr, state_ptr, masses_ptr, counts_ptr, lists_ptr,
    tokens_ptr, vocab, row_stride, parts,
    TRUNCATED: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """tokens [rows] of the rows that are not done: the first whose cumulative mass exceeds the row's share of all."""
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * 3
    peak = tl.load(state)
    if peak == float("-inf"):
        return
    floor, least = tl.load(state + 1), tl.load(state + 2)
    divisor = divisor_of(tl.load(temperature_ptr + row))
    row_ptr = logits_ptr + row * row_stride
    places = tl.arange(0, PARTS)
    masses = tl.load(masses_ptr + row * parts + places, mask=places < parts, other=0)  # [PARTS]
    least_key = tl.zeros((), tl.uint32)
    least_weight = tl.zeros((), tl.uint32)
    if TRUNCATED:
        if least < float("inf"):
            top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
            is_limited = (top_k > 0) & (top_k < vocab)
            counts = tl.load(counts_ptr + row * parts + places, mask=places < parts, other=0)
            is_found = tl.zeros((), tl.int32)
            if tl.max(counts, axis=0) <= LISTED:
                columns = tl.arange(0, LISTED)
                listed = lists_ptr + (row * PARTS + places[:, None]) * LISTED + columns[None, :]
                x = tl.load(listed, mask=columns[None, :] < counts[:, None], other=float("-inf"))  # [PARTS, LISTED]
                is_found, least_key, least_weight, kept = _cut_in_list(x, peak, top_k, top_p, is_limited, masses)
                masses = tl.where(is_found == 1, kept, masses)
            if is_found == 0:
                least_key, least_weight, masses = _cut_in_row(
                    row_ptr, vocab, divisor, peak, floor, top_k, top_p, is_limited, parts, PART, PARTS
                )
    total = tl.sum(masses, axis=0)
    target = (tl.load(uniforms_ptr + row) * total.to(tl.float64)).to(tl.int64)
    target = tl.minimum(target, total - 1)
    part = tl.sum((tl.cumsum(masses, axis=0) <= target).to(tl.int32), axis=0)
    rest = target - tl.sum(tl.where(places < part, masses, 0), axis=0)
    x = load_scaled(row_ptr, part * PART + tl.arange(0, PART), vocab, divisor)
    ends = tl.cumsum(_kept(x, peak, floor, least_key, least_weight), axis=0)
    token = part * PART + tl.sum((ends <= rest).to(tl.int32), axis=0)
    tl.store(tokens_ptr + row, tl.minimum(token, vocab - 1).to(tl.int64))

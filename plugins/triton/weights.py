"""Logits as sampling kernels compute with them: keys that order them, and weights that add up exactly."""

from __future__ import annotations

import triton
import triton.language as tl

UNIT = tl.constexpr(float(2**44))
"""What a weight of 1 counts: the sum of 2^18 of them still fits in 63 bits."""
_MIN_TEMPERATURE = tl.constexpr(1e-6)


@triton.jit
def order(x):
    """float32 -> uint32 in the same order; both zeros are equal, NaN is the largest."""
    bits = x.to(tl.uint32, bitcast=True)
    key = bits ^ tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000)
    key = tl.where(x == 0.0, 0x80000000, key)
    return tl.where(x != x, 0xFFFFFFFF, key).to(tl.uint32)


@triton.jit
def value_of(key):
    """The inverse of `order`."""
    bits = key ^ tl.where((key >> 31) != 0, 0x80000000, 0xFFFFFFFF)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def pack(key, ids):
    """A key of `order` and a token id as one int64: the largest is the best token, the first of equal ones."""
    return (key.to(tl.int64) << 31) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def bit(index):
    """Bit `index` of a uint32, counted from the highest."""
    return tl.full((), 0x80000000, tl.uint32) >> index


@triton.jit
def fixed(weights):
    """Weights in [0, 1] as multiples of 2^-44, int64."""
    return (weights * UNIT).to(tl.int64)


@triton.jit
def divisor_of(temperature):
    """What logits are divided by; 1 for greedy rows, whose temperature is 0."""
    return tl.where(temperature > 0.0, tl.maximum(temperature, _MIN_TEMPERATURE), 1.0)


@triton.jit
def load_scaled(row_ptr, ids, vocab, divisor):
    """Logits over temperature, rounded as IEEE says (so does torch); -inf beyond the vocabulary."""
    x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
    return tl.div_rn(x, divisor + tl.zeros_like(x))

"""Random numbers as a pure function of what they are for: no state, so no influence of neighbours, slots or ids.

Every number is one block of Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), a counter-based generator that passes BigCrush:

    key     = (seed mod 2^32, seed div 2^32)            the request's 64-bit seed
    counter = (output position, 0, sample index, purpose)
    uniform = (word0 div 2^5 · 2^26 + word1 div 2^6) / 2^53, in [0, 1)

This definition is stable: changing it changes what a seed means to users.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)

Words = npt.NDArray[np.uint64]
"""32-bit words held in 64 bits, so that a product of two fits."""


class Purpose(enum.IntEnum):
    """What a number decides. Numbers of different purposes at the same position are independent."""

    SAMPLE = 0
    ACCEPT = 1
    RESIDUAL = 2


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 of every column: word arrays of one length in, word arrays of that length out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    (m0, m1), (w0, w1) = map(np.uint64, MULTIPLIERS), map(np.uint64, WEYL)
    for _ in range(ROUNDS):
        left, right = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (right >> _WORD) ^ c1 ^ k0, right & _MASK, (left >> _WORD) ^ c3 ^ k1, left & _MASK
        k0, k1 = (k0 + w0) & _MASK, (k1 + w1) & _MASK
    return c0, c1, c2, c3


def uniform(
    seeds: Sequence[int], sample_indices: Sequence[int], positions: Sequence[int], purpose: Purpose = Purpose.SAMPLE
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per row, of 53 random bits.

    Args:
        seeds: any integers; taken modulo 2^64.
        sample_indices: which of a request's `n` samples the row belongs to.
        positions: number of output tokens before the one that is decided.
    """
    seed = np.array([seed & (2**64 - 1) for seed in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    counter = (
        position,
        np.zeros_like(position),
        np.array(sample_indices, dtype=np.uint64),
        np.full_like(position, int(purpose)),
    )
    high, low, _, _ = philox(counter, (seed & _MASK, seed >> _WORD))
    bits = ((high >> np.uint64(5)) << np.uint64(26)) | (low >> np.uint64(6))
    return bits.astype(np.float64) * 2.0**-53

"""Which tokens are green after which token: the one thing that processor and detector must agree on."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

DEFAULT_GAMMA = 0.25
DEFAULT_DELTA = 2.0

Numbers = npt.NDArray[np.uint64]


def seed_of(key: str) -> int:
    """64 bits of the key's hash."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def is_green(
    seed: int, previous: npt.ArrayLike, tokens: npt.ArrayLike, gamma: float = DEFAULT_GAMMA
) -> npt.NDArray[np.bool_]:
    """Whether each of `tokens` is green after `previous` (broadcast against each other).

    A token is green if a hash of key, previous token and token falls below `gamma`. So each pair is decided by itself:
    asking for one token costs one hash, and the size of the vocabulary plays no part.
    """
    before = _mix(np.asarray(previous, dtype=np.uint64) ^ np.uint64(seed))
    return _mix(before + np.asarray(tokens, dtype=np.uint64)) < np.uint64(gamma * 2**64)


def _mix(x: Numbers) -> Numbers:
    """Spread the bits of 64-bit numbers: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

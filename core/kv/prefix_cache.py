"""Hash chains over full blocks: equal hash means equal tokens from the very beginning, under equal extra keys.

The chain is SHA-256 over (hash of the block before, token ids as 32-bit integers). Extra keys (cache salt, adapter)
seed it, so requests that differ in them never share a block. A cryptographic hash, because a collision would show
one user's context to another.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256


def chain_root(*extra_keys: str | None) -> bytes:
    """The hash that a chain with these extra keys starts from."""
    return sha256(repr(extra_keys).encode()).digest()  # `repr` keeps apart what joining could mix up


def extend_chain(hashes: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int, num_tokens: int) -> None:
    """Append to `hashes` the hashes of all blocks that the first `num_tokens` of `token_ids` fill."""
    first, last = len(hashes), num_tokens // block_size
    if first >= last:
        return
    parent = hashes[-1] if hashes else root
    raw = array("i", token_ids[first * block_size : last * block_size]).tobytes()
    width = block_size * 4
    for start in range(0, len(raw), width):
        parent = sha256(parent + raw[start : start + width]).digest()
        hashes.append(parent)

"""`BlockPool`: which KV blocks are free, held, or free but still worth something.

A block is held while its reference count is above zero: one reference per request whose table names it, and one per
pin (a transfer under way). A released block keeps its published hash until it is allocated again (lazy eviction), so
the free list is also the LRU queue of the prefix cache: unhashed blocks are taken first, then the longest unused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from interlace.kv.block_lives import BlockLives
from interlace.kv.specs import NULL_BLOCK

Key = tuple[int, bytes]
"""(KV group, hash of the block's whole prefix)."""


class BlockPool:
    """All blocks of one cache. Every operation is O(1) per block.

    The free list is a doubly linked ring over two integer lists with `NULL_BLOCK` as its sentinel, which is why the
    null block can never be allocated.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs the null block and one more, not {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free = num_blocks - 1
        self.num_pins = 0
        self.lives = BlockLives(num_blocks)
        self._refs = [0] * num_blocks
        self._keys: list[Key | None] = [None] * num_blocks
        self._cached: dict[Key, int] = {}
        self._next = [(block + 1) % num_blocks for block in range(num_blocks)]
        self._prev = [(block - 1) % num_blocks for block in range(num_blocks)]

    @property
    def num_usable(self) -> int:
        """Blocks that can be held at all: all but the null block."""
        return self.num_blocks - 1

    @property
    def num_cached(self) -> int:
        """Blocks with a published hash, held or free."""
        return len(self._cached)

    def is_free(self, block: int) -> bool:
        return self._refs[block] == 0

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, forgetting what they cached. The caller has checked `num_free`."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} free")
        blocks = []
        block, stride = self._next[NULL_BLOCK], self.lives.stride
        for _ in range(count):
            blocks.append(block)
            if not block % stride:
                self.lives.take(block, self._keys[block] is not None)
            self._refs[block] = 1
            self.withdraw(block)
            block = self._next[block]
        # Cut the taken run out of the ring in one go.
        self._next[NULL_BLOCK] = block
        self._prev[block] = NULL_BLOCK
        self.num_free -= count
        return blocks

    def share(self, block: int) -> None:
        """One more reference to a block, which may be free (a prefix hit)."""
        if self._refs[block] == 0:
            self._unlink(block)
        self._refs[block] += 1
        if not block % self.lives.stride:
            self.lives.use(block)

    def release(self, blocks: Iterable[int]) -> int:
        """Drop one reference of each; null blocks are skipped. Returns how many became free.

        Blocks that become free queue for reuse in the order given: hashed ones at the end, others at the front."""
        freed = 0
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            refs = self._refs[block] - 1
            if refs < 0:
                raise ValueError(f"block {block} is released more often than it was taken")
            self._refs[block] = refs
            if refs == 0:
                before = NULL_BLOCK if self._keys[block] is None else self._prev[NULL_BLOCK]
                after = self._next[before]
                self._next[before] = self._prev[after] = block
                self._prev[block], self._next[block] = before, after
                freed += 1
        self.num_free += freed
        return freed

    def pin(self, block: int) -> None:
        """Hold a block for something that is no request, such as a transfer."""
        self.share(block)
        self.num_pins += 1

    def unpin(self, block: int) -> None:
        self.release((block,))
        self.num_pins -= 1

    def lookup(self, group: int, block_hash: bytes) -> int | None:
        """The block that holds this content, or None."""
        return self._cached.get((group, block_hash))

    def publish(self, block: int, key: Key) -> bool:
        """State what a held block contains. False if another block is already known for it (no duplicates)."""
        if key in self._cached or self._keys[block] is not None:
            return False
        self._cached[key] = block
        self._keys[block] = key
        return True

    def withdraw(self, block: int, key: Key | None = None) -> None:
        """Forget what a block contains (only if it is `key`, when given)."""
        held = self._keys[block]
        if held is not None and (key is None or key == held):
            del self._cached[held]
            self._keys[block] = None

    def forget_all(self) -> None:
        """Empty the prefix cache; held blocks stay held. What was cached is allocated next: its memory has been touched
        already, while that of blocks never used would be taken from the system in addition."""
        cached = [block for block in self._cached.values() if self._refs[block] == 0]
        for block in cached:
            self._unlink(block)
            self._refs[block] = 1
        self._cached.clear()
        self._keys = [None] * self.num_blocks
        self.release(cached)

    def _unlink(self, block: int) -> None:
        """Out of the free list."""
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before
        self.num_free -= 1

    def block_map(self, stride: int = 1) -> bytes:
        """One byte for every `stride`-th usable block, in order of id: 0 free, 1 free but cached, 2 held once, 3 held
        more than once."""
        refs, keys = self._refs[1::stride], self._keys[1::stride]
        states = [(2 if held == 1 else 3) if held else key is not None for held, key in zip(refs, keys, strict=True)]
        return bytes(states)

    def check_integrity(self, references: Mapping[int, int]) -> None:
        """Compare with the references that are known to exist (block → count, pins excluded).

        Raises `AssertionError` naming leaked, doubly freed or doubly listed blocks."""
        free = set()
        block = self._next[NULL_BLOCK]
        while block != NULL_BLOCK:
            if block in free:
                raise AssertionError(f"block {block} is in the free list twice")
            if self._prev[self._next[block]] != block:
                raise AssertionError(f"the free list is broken at block {block}")
            free.add(block)
            block = self._next[block]
        if len(free) != self.num_free:
            raise AssertionError(f"num_free is {self.num_free}, the free list has {len(free)} blocks")
        pins = 0
        for block in range(1, self.num_blocks):
            expected, held = references.get(block, 0), self._refs[block]
            if (held == 0) != (block in free):
                listed = "listed" if block in free else "not listed"
                raise AssertionError(f"block {block} has {held} references and is {listed} as free")
            if held < expected:
                raise AssertionError(f"block {block} is named by {expected} tables but has {held} references")
            pins += held - expected
        if pins != self.num_pins:
            raise AssertionError(f"blocks leaked: {pins} references belong to no request, {self.num_pins} are pins")
        for key, block in self._cached.items():
            if self._keys[block] != key:
                raise AssertionError(f"the cache names block {block} for a content it does not have")
        if sum(key is not None for key in self._keys) != len(self._cached):
            raise AssertionError("a block has a hash that the cache does not know")

"""`BlockLives`: how long KV blocks live, wait and lie idle, measured on a sample of them."""

from __future__ import annotations

from interlace.messages import KVBlockTimes

EVERY = 100
"""One block in so many is watched, in a large cache."""
LEAST = 64
"""Blocks watched in a small cache, if it has as many: its blocks change hands too seldom for fewer."""


class BlockLives:
    """Times of the watched blocks: those whose id is a multiple of `stride`. Which ones does not matter, since the free
    list takes all blocks round in turn. Every operation is O(1).

    A block is *used* when it is taken, and whenever a prefix hit finds it."""

    def __init__(self, num_blocks: int) -> None:
        self.stride = max(1, min(EVERY, num_blocks // LEAST))
        self.now = 0.0
        """The time of what happens next, as the engine core was told it."""
        self._lives: dict[int, tuple[float, float]] = {}  # block → (when it was taken, when it was last used)
        self._times: KVBlockTimes | None = None

    def take(self, block: int, evicted: bool) -> None:
        """A watched block has a new owner. `evicted`: it still held a prefix that is lost now."""
        life = self._lives.get(block)
        if evicted and life is not None:
            taken, used = life
            times = self._news()
            times.lifetimes.append(self.now - taken)
            times.idle_before_evict.append(self.now - used)
        self._lives[block] = (self.now, self.now)

    def use(self, block: int) -> None:
        """A prefix hit found a watched block."""
        life = self._lives.get(block)
        if life is not None:
            taken, used = life
            self._news().reuse_gaps.append(self.now - used)
            self._lives[block] = (taken, self.now)

    def news(self) -> KVBlockTimes | None:
        """The times since the last call, or None if there are none."""
        times, self._times = self._times, None
        return times

    def _news(self) -> KVBlockTimes:
        if self._times is None:
            self._times = KVBlockTimes([], [], [])
        return self._times

"""`BlockLives`: lifetime, idle time and reuse gaps of a sample of the KV blocks."""

import pytest

from interlace.kv.block_lives import EVERY, BlockLives
from interlace.kv.block_pool import BlockPool
from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.testing.harness import EngineHarness


@pytest.mark.parametrize(("num_blocks", "stride"), [(2, 1), (64, 1), (640, 10), (64 * EVERY, EVERY), (10**6, EVERY)])
def test_large_caches_watch_one_block_in_a_hundred_and_small_ones_more(num_blocks, stride):
    assert BlockLives(num_blocks).stride == stride


def test_a_block_that_is_hit_and_then_evicted():
    pool = BlockPool(3)
    pool.lives.now = 10.0
    first, second = pool.allocate(2)
    pool.publish(first, (0, b"first"))
    pool.release([second, first])
    assert pool.lives.news() is None, "nothing has ended yet"
    pool.lives.now = 14.0
    pool.share(first)
    pool.lives.now = 15.0
    pool.share(first)
    times = pool.lives.news()
    assert (times.lifetimes, times.idle_before_evict, times.reuse_gaps) == ([], [], [4.0, 1.0])
    pool.release([first, first])
    pool.lives.now = 20.0
    pool.allocate(2)  # the one without content goes, too, and counts as no eviction
    times = pool.lives.news()
    assert (times.lifetimes, times.idle_before_evict, times.reuse_gaps) == ([10.0], [5.0], [])
    assert pool.lives.news() is None


def test_a_block_that_was_forgotten_is_not_evicted():
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.publish(block, (0, b"x"))
    pool.release([block])
    pool.forget_all()
    pool.allocate(1)
    assert pool.lives.news() is None


def test_only_every_so_many_blocks_are_watched():
    pool = BlockPool(64 * EVERY)
    blocks = pool.allocate(pool.num_free)
    for number, block in enumerate(blocks):
        pool.publish(block, (0, number.to_bytes(4, "little")))
    pool.release(blocks)
    pool.lives.now = 1.0
    pool.allocate(pool.num_free)
    assert len(pool.lives.news().lifetimes) == (pool.num_usable - 1) // EVERY


def test_steps_tell_it_in_the_time_of_the_engine():
    engine = EngineHarness(Fcfs(Fcfs.Options()), num_blocks=9)
    size = engine.core.kv.block_size

    def run(first_token):
        engine.add(range(first_token, first_token + 4 * size), max_tokens=1)
        began, found = engine.clock.now(), []
        while engine.core.has_work:
            stats = engine.step().stats
            if stats is not None and stats.kv_block_times is not None:
                found.append(stats.kv_block_times)
        engine.clock.advance(100.0)
        return began, found

    first, _ = run(0)
    second, [hits] = run(0)
    assert hits.lifetimes == [] and hits.reuse_gaps == pytest.approx([second - first] * len(hits.reuse_gaps))
    assert len(hits.reuse_gaps) == 3, "the last block of the prompt is computed again"
    run(1000)
    third, [lost] = run(2000)
    assert len(lost.lifetimes) == len(lost.idle_before_evict) > 0 and lost.reuse_gaps == []
    assert max(lost.lifetimes) == pytest.approx(third - first)
    assert all(idle <= life for idle, life in zip(lost.idle_before_evict, lost.lifetimes, strict=True))

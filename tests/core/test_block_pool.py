"""`BlockPool`: who holds a block, what it is still good for, who gets it next."""

import pytest

from interlace.kv.block_pool import BlockPool


def key(name: str, group: int = 0):
    return (group, name.encode())


def test_every_block_but_the_null_block_can_be_held():
    pool = BlockPool(5)
    assert pool.num_usable == pool.num_free == 4
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0


def test_more_than_is_free_cannot_be_allocated_and_nothing_changes():
    pool = BlockPool(5)
    pool.allocate(3)
    with pytest.raises(ValueError, match="2 blocks asked for, 1 free"):
        pool.allocate(2)
    assert pool.num_free == 1
    assert pool.allocate(0) == []


def test_a_pool_needs_the_null_block_and_one_more():
    with pytest.raises(ValueError, match="not 1"):
        BlockPool(1)


def test_a_shared_block_is_free_only_after_the_last_reference_goes():
    pool = BlockPool(3)
    [block] = pool.allocate(1)
    pool.share(block)
    assert pool.release([block]) == 0
    assert pool.release([block]) == 1
    assert pool.is_free(block)


def test_releasing_more_often_than_taking_is_an_error():
    pool = BlockPool(3)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="more often than it was taken"):
        pool.release(blocks)


def test_null_blocks_are_skipped_when_released():
    pool = BlockPool(3)
    assert pool.release([0, *pool.allocate(1), 0]) == 1


def test_a_released_block_keeps_its_content_until_it_is_allocated_again():
    pool = BlockPool(3)
    [block] = pool.allocate(1)
    assert pool.publish(block, key("a"))
    pool.release([block])
    assert pool.lookup(0, b"a") == block
    pool.allocate(2)
    assert pool.lookup(0, b"a") is None
    assert pool.num_cached == 0


def test_blocks_without_content_are_taken_before_cached_ones():
    pool = BlockPool(5)
    blocks = pool.allocate(4)
    pool.publish(blocks[0], key("a"))
    pool.publish(blocks[1], key("b"))
    pool.release(blocks)
    assert set(pool.allocate(2)) == {blocks[2], blocks[3]}
    assert pool.num_cached == 2


def test_the_block_unused_for_longest_is_evicted_first():
    pool = BlockPool(4)
    a, b, c = pool.allocate(3)
    for block, name in ((a, "a"), (b, "b"), (c, "c")):
        pool.publish(block, key(name))
        pool.release([block])
    pool.share(a)  # a hit makes it the newest again
    pool.release([a])
    assert pool.allocate(3) == [b, c, a]


def test_a_hit_on_a_free_block_takes_it_out_of_the_free_list():
    pool = BlockPool(3)
    a, b = pool.allocate(2)
    pool.publish(a, key("a"))
    pool.release([a, b])
    pool.share(a)
    assert pool.num_free == 1
    assert pool.allocate(1) == [b]
    assert pool.lookup(0, b"a") == a


def test_one_content_is_known_for_one_block():
    pool = BlockPool(4)
    a, b = pool.allocate(2)
    assert pool.publish(a, key("x"))
    assert not pool.publish(b, key("x"))
    assert not pool.publish(a, key("y")), "a block has one content"
    assert pool.publish(b, key("x", group=1)), "another KV group is another content"
    assert pool.lookup(0, b"x") == a
    assert pool.lookup(1, b"x") == b


def test_withdrawing_forgets_only_the_content_that_is_meant():
    pool = BlockPool(3)
    [a] = pool.allocate(1)
    pool.publish(a, key("new"))
    pool.withdraw(a, key("old"))
    assert pool.lookup(0, b"new") == a
    pool.withdraw(a, key("new"))
    assert pool.lookup(0, b"new") is None
    pool.withdraw(a)


def test_a_pinned_block_stays_until_the_pin_goes():
    pool = BlockPool(3)
    [a] = pool.allocate(1)
    pool.pin(a)
    assert pool.release([a]) == 0
    pool.check_integrity({})
    pool.unpin(a)
    assert pool.is_free(a)
    assert pool.num_pins == 0


def test_forgetting_all_leaves_held_blocks_held():
    pool = BlockPool(4)
    a, b = pool.allocate(2)
    pool.publish(a, key("a"))
    pool.publish(b, key("b"))
    pool.release([b])
    pool.forget_all()
    assert (pool.num_cached, pool.num_free) == (0, 2)
    pool.check_integrity({a: 1})


def test_what_was_forgotten_is_used_again_before_blocks_that_never_were():
    """Their memory may not have been touched yet."""
    pool = BlockPool(9)
    for round_ in range(3):
        blocks = pool.allocate(3)
        for block in blocks:
            pool.publish(block, key(f"{block} {round_}"))
        pool.release(blocks)
        pool.forget_all()
        assert sorted(blocks) == [1, 2, 3]
    pool.check_integrity({})


class TestIntegrity:
    """Each thing that `check_integrity` promises to name."""

    @pytest.fixture
    def pool(self):
        pool = BlockPool(6)
        self.held = pool.allocate(2)
        pool.publish(self.held[0], key("a"))
        return pool

    def complaint(self, pool, references=None) -> str:
        with pytest.raises(AssertionError) as caught:
            pool.check_integrity(dict.fromkeys(self.held, 1) if references is None else references)
        return str(caught.value)

    def test_a_sound_pool(self, pool):
        pool.check_integrity(dict.fromkeys(self.held, 1))

    def test_a_leaked_block(self, pool):
        assert "blocks leaked: 1 references belong to no request" in self.complaint(pool, {self.held[0]: 1})

    def test_a_block_that_tables_name_without_holding_it(self, pool):
        assert "named by 2 tables but has 1 references" in self.complaint(pool, {self.held[0]: 2, self.held[1]: 1})

    def test_a_block_listed_as_free_while_held(self, pool):
        pool._refs[3] = 1
        assert "block 3 has 1 references and is listed as free" in self.complaint(pool)

    def test_a_count_of_free_blocks_that_is_wrong(self, pool):
        pool.num_free += 1
        assert "num_free is 4, the free list has 3 blocks" in self.complaint(pool)

    def test_a_broken_free_list(self, pool):
        pool._prev[4] = 5
        assert "the free list is broken" in self.complaint(pool)

    def test_a_circle_in_the_free_list(self, pool):
        pool._next[4], pool._prev[3] = 3, 4
        assert "block 3 is in the free list twice" in self.complaint(pool)

    def test_a_cache_entry_for_a_block_with_other_content(self, pool):
        pool._cached[key("b")] = self.held[1]
        assert "for a content it does not have" in self.complaint(pool)

    def test_a_hash_the_cache_does_not_know(self, pool):
        pool._keys[self.held[1]] = key("b")
        assert "a hash that the cache does not know" in self.complaint(pool)

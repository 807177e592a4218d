"""`KVManager`: blocks for requests, shared prefixes, windows."""

import pytest

from interlace.kv.manager import KVManager
from interlace.kv.specs import KVCacheConfig, KVGroup, blocks_for, group_layers
from interlace.messages import EngineRequest, SamplingParams
from interlace.request import RequestState

SIZE = 4


def make(*windows: int, num_blocks=40, prefix_caching=True, max_step_tokens=8) -> KVManager:
    groups = tuple(KVGroup("window" if w else "full", w, (i,)) for i, w in enumerate(windows or (0,)))
    config = KVCacheConfig(block_size=SIZE, num_blocks=num_blocks, groups=groups, bytes_per_block=1)
    return KVManager(config, prefix_caching, max_step_tokens)


def request(kv, tokens, id="r", params=None, **fields) -> RequestState:
    params = params or SamplingParams()
    engine_request = EngineRequest(
        id=id, prompt_token_ids=list(tokens), params=params, arrival_time=0.0, seed=0, **fields
    )
    return RequestState(engine_request, 256, len(kv.config.groups))


def admit(kv, state) -> int:
    """Admit with whatever is cached; returns the hit tokens."""
    hit = kv.find_prefix(state)
    kv.admit(state, hit)
    state.num_planned = hit.num_tokens
    return hit.num_tokens


def compute(kv, state, end=None) -> None:
    """Plan tokens up to `end` (default: all known ones) and publish, as sealing a step does."""
    end = state.num_known if end is None else end
    kv.trim(state)
    kv.grow(state, end)
    state.num_planned = end
    kv.publish(state)


def computed(kv, tokens, **fields) -> RequestState:
    """A new request, admitted and computed as a whole."""
    state = request(kv, tokens, **fields)
    admit(kv, state)
    compute(kv, state)
    return state


def hits(kv, tokens, **fields) -> int:
    return kv.find_prefix(request(kv, tokens, **fields)).num_tokens


class TestPrefixes:
    def test_the_longest_run_of_full_blocks_is_found(self):
        kv = make()
        computed(kv, range(10))
        assert hits(kv, range(10)) == 8
        assert hits(kv, [*range(6), 99, 99, 99]) == 4
        assert hits(kv, [99, *range(10)]) == 0

    def test_the_last_token_is_always_recomputed(self):
        kv = make()
        computed(kv, range(9))
        assert hits(kv, range(9)) == 8
        assert hits(kv, range(8)) == 4, "8 tokens are cached, but the eighth gives the logits to sample from"

    def test_hits_survive_the_request_that_made_them(self):
        kv = make()
        kv.free(computed(kv, range(9)))
        assert kv.pool.num_free == kv.pool.num_usable
        assert hits(kv, range(9)) == 8

    def test_looking_changes_nothing(self):
        kv = make()
        computed(kv, range(9))
        before = kv.pool.num_free
        kv.find_prefix(request(kv, range(9)))
        assert kv.pool.num_free == before

    def test_output_tokens_are_cached_like_prompt_tokens(self):
        kv = make()
        first = computed(kv, range(6))
        first.token_ids += [6, 7, 8]
        first.num_known = 9
        compute(kv, first)
        assert hits(kv, range(20)) == 8

    def test_only_known_tokens_are_published(self):
        kv = make()
        first = computed(kv, range(7))
        compute(kv, first, end=8)  # the eighth is still being sampled
        assert hits(kv, range(20)) == 4

    @pytest.mark.parametrize("fields", [{"cache_salt": "a"}, {"adapter": "x"}, {"cache_salt": "b"}])
    def test_salt_and_adapter_separate(self, fields):
        kv = make()
        computed(kv, range(9), cache_salt="b", adapter="y")
        computed(kv, range(9))
        assert hits(kv, range(9), **fields) == 0
        computed(kv, range(9), id="own", **fields)
        assert hits(kv, range(9), **fields) == 8

    def test_a_request_may_decline_to_read_and_still_publishes(self):
        kv = make()
        computed(kv, range(9))
        declines = SamplingParams(skip_reading_prefix_cache=True)
        assert hits(kv, range(9), params=declines) == 0
        computed(kv, range(50, 59), params=declines)
        assert hits(kv, range(50, 59)) == 8

    def test_prompt_logprobs_need_every_position_computed(self):
        kv = make()
        computed(kv, range(9))
        assert hits(kv, range(9), params=SamplingParams(prompt_logprobs=1)) == 0

    def test_a_withdrawn_prefix_is_no_hit(self):
        kv = make()
        state = request(kv, range(9))
        admit(kv, state)
        kv.grow(state, 9)
        state.num_planned = 9
        published = kv.publish(state)
        assert hits(kv, range(9)) == 8
        kv.withdraw(published)
        assert hits(kv, range(9)) == 0

    def test_the_first_missing_block_is_named(self):
        kv = make()
        computed(kv, range(9))
        assert kv.find_prefix(request(kv, range(9))).missing is None
        longer = request(kv, range(17))
        assert kv.find_prefix(longer).missing == longer.block_hashes[2]


class TestSiblings:
    @pytest.mark.parametrize("prefix_caching", [True, False])
    def test_samples_of_one_prompt_share_its_blocks_without_copying(self, prefix_caching):
        kv = make(prefix_caching=prefix_caching)
        first = computed(kv, range(10), id="a", group="g")
        second = request(kv, range(10), id="b", group="g")
        assert admit(kv, second) == 8
        compute(kv, second)
        assert second.blocks[0][:2] == first.blocks[0][:2]
        assert second.blocks[0][2] != first.blocks[0][2]
        assert kv.pool.num_usable - kv.pool.num_free == 4
        kv.free(first)
        kv.check_integrity([second])
        assert kv.pool.num_usable - kv.pool.num_free == 3, "what the sibling still holds is not freed"
        kv.free(second)
        assert kv.pool.num_free == kv.pool.num_usable

    def test_without_prefix_caching_only_siblings_share(self):
        kv = make(prefix_caching=False)
        computed(kv, range(10), id="a", group="g")
        assert hits(kv, range(10), id="b", group="h") == 0
        assert hits(kv, range(10), id="c") == 0

    def test_siblings_of_another_salt_do_not_share(self):
        kv = make(prefix_caching=False)
        computed(kv, range(10), id="a", group="g", cache_salt="s")
        assert hits(kv, range(10), id="b", group="g", cache_salt="t") == 0


class TestEviction:
    def test_tails_are_evicted_before_beginnings(self):
        kv = make(num_blocks=5)
        kv.free(computed(kv, range(16)))
        computed(kv, [90, 91, 92, 93, 94], id="other")  # takes two of the four blocks
        assert hits(kv, range(16)) == 8

    def test_the_prefix_unused_for_longest_is_evicted_first(self):
        kv = make(num_blocks=7)
        old, new = range(9), range(50, 59)
        for tokens in (old, new):
            kv.free(computed(kv, tokens))
        again = request(kv, old)  # used once more, so `new` is older now
        admit(kv, again)
        kv.free(again)
        computed(kv, range(90, 102), id="other")  # three blocks
        assert hits(kv, old) == 8
        assert hits(kv, new) < 8

    def test_blocks_in_use_are_never_evicted(self):
        kv = make(num_blocks=6)
        held = computed(kv, range(9))
        kv.free(computed(kv, range(50, 56), id="b"))
        computed(kv, range(90, 97), id="c")
        assert hits(kv, range(9)) == 8
        assert kv.pool.num_free == 0
        assert len(set(held.blocks[0])) == 3


class TestWindows:
    def test_a_window_group_holds_only_the_blocks_that_can_be_seen(self):
        kv = make(0, 6)
        state = request(kv, range(40))
        admit(kv, state)
        for end in range(8, 41, 8):
            compute(kv, state, end)
            held = [index for index, block in enumerate(state.blocks[1]) if block]
            first_needed = max(0, end - 8 - 6 + 1) // SIZE
            assert held == list(range(first_needed, end // SIZE))
        assert all(state.blocks[0]), "full attention keeps everything"
        kv.check_integrity([state])
        kv.free(state)
        assert kv.pool.num_free == kv.pool.num_usable

    def test_blocks_leave_the_window_while_decoding(self):
        kv = make(5)
        state = computed(kv, range(8))
        for position in range(8, 60):
            state.token_ids.append(position)
            state.num_known += 1
            compute(kv, state)
            first_needed = max(0, position - 5 + 1) // SIZE
            held = [index for index, block in enumerate(state.blocks[0]) if block]
            assert held[0] == first_needed
            assert held == list(range(first_needed, position // SIZE + 1))

    def test_a_hit_needs_only_the_blocks_in_the_window(self):
        kv = make(6)
        state = request(kv, range(41))
        admit(kv, state)
        for end in range(8, 41, 8):
            compute(kv, state, end)
        hit = kv.find_prefix(request(kv, range(41)))
        assert hit.num_tokens == 40
        assert [bool(block) for block in hit.tables[0]] == [False] * 8 + [True] * 2

    def test_groups_agree_on_the_longest_prefix_that_all_can_serve(self):
        kv = make(0, 6)
        state = request(kv, range(41))
        admit(kv, state)
        for end in range(8, 41, 8):
            compute(kv, state, end)
        assert hits(kv, range(41)) == 40
        kv.pool.withdraw(state.blocks[1][9])  # the newest block of the window group
        # The window of token 36 reaches back to 31, into block 7.
        assert hits(kv, range(41)) == 36
        kv.pool.withdraw(state.blocks[0][2])
        # Full attention ends after 8 tokens; the window group must then cover tokens 3 to 7.
        found = kv.find_prefix(request(kv, range(41)))
        assert found.num_tokens == 8
        assert [len(table) for table in found.tables] == [2, 2]

    def test_admission_counts_at_most_what_a_window_ever_holds(self):
        kv = make(6, num_blocks=100, max_step_tokens=8)
        state = request(kv, range(200))
        hit = kv.find_prefix(state)
        assert kv.num_needed(hit, 200) == (6 + 8) // SIZE + 2
        assert make(0, num_blocks=100).num_needed(hit, 200) == 50

    def test_a_hit_never_makes_a_window_need_more(self):
        kv = make(6, num_blocks=100, max_step_tokens=8)
        state = request(kv, range(41))
        admit(kv, state)
        for end in range(8, 41, 8):
            compute(kv, state, end)
        kv.free(state)
        again = request(kv, range(200))
        hit = kv.find_prefix(again)
        assert hit.num_tokens == 40
        assert kv.num_needed(hit, 200) == (6 + 8) // SIZE + 2


class TestBookkeeping:
    def test_growing_takes_just_what_is_missing(self):
        kv = make(0, 6)
        state = request(kv, range(20))
        admit(kv, state)
        assert kv.num_missing(state, 9) == 6
        assert [len(new) for new in kv.grow(state, 9)] == [3, 3]
        state.num_planned = 9
        assert kv.num_missing(state, 12) == 0
        assert kv.grow(state, 12) == [[], []]
        assert kv.num_reserved(state) == 4

    def test_needed_counts_hits_that_are_free_and_not_those_that_are_held(self):
        kv = make()
        first = computed(kv, range(9))
        hit = kv.find_prefix(request(kv, range(9)))
        assert kv.num_needed(hit, 9) == 1
        kv.free(first)
        assert kv.num_needed(hit, 9) == 3

    def test_usage_is_the_share_of_blocks_held(self):
        kv = make(num_blocks=9)
        assert kv.usage == 0.0
        computed(kv, range(8))
        assert kv.usage == 0.25

    def test_a_cache_without_groups_needs_no_blocks(self):
        config = KVCacheConfig(block_size=SIZE, num_blocks=2, groups=(), bytes_per_block=1)
        kv = KVManager(config)
        state = request(kv, range(40))
        assert admit(kv, state) == 0
        compute(kv, state)
        assert kv.pool.num_free == 1

    def test_integrity_names_the_request_that_is_wrong(self):
        kv = make()
        state = computed(kv, range(9))
        kv.check_integrity([state])
        state.blocks[0][1] = state.blocks[0][0]
        with pytest.raises(AssertionError, match="names a block twice"):
            kv.check_integrity([state])
        state.blocks[0].pop()
        state.blocks[0].pop()
        with pytest.raises(AssertionError, match="has only 1 blocks"):
            kv.check_integrity([state])


class TestGrouping:
    def test_layers_of_one_kind_are_one_group(self):
        [group] = group_layers([("full", 0, 2, 64)] * 5)
        assert (group.kind, group.layers) == ("full", (0, 1, 2, 3, 4))

    def test_mixed_layers_are_cut_into_groups_of_equal_size(self):
        keys = [("full", 0, 1, 64) if layer % 6 == 5 else ("window", 512, 1, 64) for layer in range(18)]
        groups = group_layers(keys)
        assert sorted(layer for group in groups for layer in group.layers) == list(range(18))
        assert {len(group.layers) for group in groups} == {3}
        assert [group.kind for group in groups].count("full") == 1

    def test_layers_of_different_bytes_are_refused(self):
        with pytest.raises(Exception, match="different sizes"):
            group_layers([("full", 0, 2, 64), ("full", 0, 1, 64)])

    def test_blocks_for_rounds_up(self):
        assert [blocks_for(tokens, 4) for tokens in (0, 1, 4, 5)] == [0, 1, 1, 2]

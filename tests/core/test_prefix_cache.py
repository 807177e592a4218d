"""Hash chains: equal exactly when tokens from the beginning and extra keys are equal."""

import itertools

from interlace.kv.prefix_cache import chain_root, extend_chain


def chain(tokens, block_size=2, root=b"root", num_tokens=None):
    hashes = []
    extend_chain(hashes, root, tokens, block_size, len(tokens) if num_tokens is None else num_tokens)
    return hashes


def test_only_full_blocks_of_known_tokens_are_hashed():
    assert len(chain([1, 2, 3, 4, 5])) == 2
    assert len(chain([1, 2, 3, 4, 5], num_tokens=3)) == 1
    assert chain([1]) == []


def test_a_chain_grows_to_what_it_would_have_been_at_once():
    tokens = list(range(12))
    grown = []
    for known in (1, 5, 5, 6, 12):
        extend_chain(grown, b"root", tokens, 2, known)
    assert grown == chain(tokens)


def test_a_hash_stands_for_everything_before_its_block():
    same_second_block = chain([1, 2, 3, 4]), chain([9, 2, 3, 4])
    assert same_second_block[0][1] != same_second_block[1][1]
    assert chain([1, 2, 3, 4])[0] == chain([1, 2, 9, 9])[0]


def test_token_borders_matter():
    assert chain([1, 256])[0] != chain([256, 1])[0]
    assert chain([0, 0])[0] != chain([0, 0, 0], block_size=3)[0]


def test_roots_differ_in_every_extra_key():
    keys = [None, "", "a", "b", "a\x1f=b", "\x00", "=a"]
    roots = {chain_root(*pair) for pair in itertools.product(keys, repeat=2)}
    roots |= {chain_root(*triple) for triple in itertools.product(keys[:4], repeat=3)}
    assert len(roots) == len(keys) ** 2 + 4**3

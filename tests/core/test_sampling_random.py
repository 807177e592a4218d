"""The counter-based generator: known answers, uniformity, independence of its keys."""

import numpy as np
import pytest

from interlace.sampling.random import Purpose, philox, uniform

# Published with the Random123 library (kat_vectors, philox4x32, 10 rounds).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(np.array([int(word, 16)], dtype=np.uint64) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    assert [int(word[0]) for word in philox(words(counter), words(key))] == [int(word, 16) for word in answer.split()]


def test_uniform_is_built_from_the_documented_words():
    seed, sample_index, position = 0x299F31D0A4093822, 5, 77
    counter = tuple(np.array([word], dtype=np.uint64) for word in (position, 0, sample_index, int(Purpose.ACCEPT)))
    key = tuple(np.array([word], dtype=np.uint64) for word in (seed % 2**32, seed // 2**32))
    high, low, _, _ = (int(word[0]) for word in philox(counter, key))
    expected = ((high // 2**5) * 2**26 + low // 2**6) / 2**53
    assert uniform([seed], [sample_index], [position], Purpose.ACCEPT).tolist() == [expected]


def test_uniform_values_are_pinned():
    """A seed means the same tokens in every later version."""
    assert uniform([0, 1, 42], [0, 0, 3], [0, 0, 10]).tolist() == [
        0.39904647231489565,
        0.8902591757080309,
        0.6267634253255828,
    ]


def test_rows_do_not_depend_on_their_neighbours():
    seeds, indices, positions = [3, -7, 2**63 - 1, 11], [0, 1, 2, 3], [0, 10, 1000, 5]
    together = uniform(seeds, indices, positions)
    alone = [uniform([s], [i], [p])[0] for s, i, p in zip(seeds, indices, positions, strict=True)]
    assert together.tolist() == alone


def test_negative_seeds_are_taken_modulo_two_to_the_64():
    assert uniform([-1], [0], [0]) == uniform([2**64 - 1], [0], [0])


def test_every_key_matters():
    base = uniform([1], [0], [0], Purpose.SAMPLE)[0]
    others = [
        uniform([2], [0], [0])[0],
        uniform([1 + 2**32], [0], [0])[0],
        uniform([1], [1], [0])[0],
        uniform([1], [0], [1])[0],
        uniform([1], [0], [0], Purpose.ACCEPT)[0],
        uniform([1], [0], [0], Purpose.RESIDUAL)[0],
    ]
    assert len({base, *others}) == 7


@pytest.mark.parametrize("varied", ["seed", "sample_index", "position"])
def test_uniformity_and_serial_independence(varied):
    """Chi-square over 256 cells, and over 16 x 16 cells of consecutive pairs, within 4 standard deviations."""
    count = 1 << 16
    counting, zeros = list(range(count)), [0] * count
    columns = {name: counting if name == varied else zeros for name in ("seed", "sample_index", "position")}
    values = uniform(columns["seed"], columns["sample_index"], columns["position"])
    assert values.min() >= 0.0
    assert values.max() < 1.0
    singles = np.bincount((values * 256).astype(int), minlength=256)
    cells = (values * 16).astype(int)
    pairs = np.bincount(cells[0::2] * 16 + cells[1::2], minlength=256)
    for observed in (singles, pairs):
        expected = observed.sum() / 256
        statistic = ((observed - expected) ** 2 / expected).sum()
        assert abs(statistic - 255) < 4 * np.sqrt(2 * 255)

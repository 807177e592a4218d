"""Sampling in Triton kernels, interpreted: the host's tokens for the host's numbers, whatever path a row takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interlace.interfaces.kernels import Kernels, KernelSpec
from interlace.plugins.kernels.triton import TritonKernels
from interlace.sampling.device import SamplingColumns, SamplingMode, sample_rows
from interlace.sampling.distribution import Shape, draw_rows, final_probabilities
from interlace.sampling.random import uniform
from interlace.testing.sampling_cases import columns_of

KERNELS = TritonKernels(Kernels.Options(), KernelSpec("float32", "cpu"))
VOCAB = 9001  # three parts, the last one not full


def _logits(rows: int, vocab: int = VOCAB, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def _columns(shapes: list[Shape], seed: int = 5) -> SamplingColumns:
    rows = len(shapes)
    return columns_of(shapes, [seed + row for row in range(rows)], [0] * rows, list(range(rows)), "cpu")


def _numbers(rows: int, seed: int = 5) -> np.ndarray:
    return uniform([seed + row for row in range(rows)], [0] * rows, list(range(rows)))


SHAPES = {
    "plain": Shape(),
    "cold": Shape(0.3),
    "hot": Shape(2.5),
    "top_k of the list": Shape(0.9, top_k=40),
    "top_k 1": Shape(top_k=1),
    "top_k of the whole row": Shape(top_k=3000),
    "top_k of all": Shape(top_k=VOCAB),
    "nucleus of the list": Shape(0.6, top_p=0.9),
    "nucleus beyond the list": Shape(3.0, top_p=0.95),
    "tiny nucleus": Shape(top_p=1e-6),
    "nearly everything": Shape(top_p=0.999999),
    "min_p": Shape(min_p=0.05),
    "min_p 1": Shape(min_p=1.0),
    "everything": Shape(0.8, top_k=200, top_p=0.8, min_p=0.01),
}


QUICK = ("plain", "top_k of the list", "nucleus of the list", "min_p", "everything")


@pytest.mark.parametrize(
    "shape",
    [pytest.param(shape, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, shape in SHAPES.items()],
)
def test_same_tokens_as_the_host(shape):
    """The same numbers choose the same tokens: by `draw` and by `sample`."""
    logits = _logits(2)
    expected = draw_rows(logits.clone(), [0, 1], [shape] * 2, _numbers(2)).tolist()
    assert KERNELS.draw(logits.clone(), [0, 1], [shape] * 2, _numbers(2)).tolist() == expected
    assert KERNELS.sample(logits.clone(), _columns([shape] * 2), SamplingMode.TRUNCATED).tolist() == expected


def test_draws_of_chosen_rows():
    logits, shapes = _logits(5), [Shape(), Shape(top_k=5)]
    expected = draw_rows(logits.clone(), [4, 1], shapes, np.array([0.2, 0.9])).tolist()
    assert KERNELS.draw(logits, [4, 1], shapes, np.array([0.2, 0.9])).tolist() == expected


def test_a_temperature_of_almost_zero_still_draws():
    logits = torch.zeros(1, 100)
    assert KERNELS.draw(logits, [0], [Shape(1e-40)], np.array([0.995])).tolist() == [99]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Shape(), Shape(0.7, top_k=7), Shape(top_p=0.7), Shape(1.5, min_p=0.2)], ids=str)
def test_the_whole_distribution(shape):
    """A grid of numbers over [0, 1) gives every token its share, to within one number."""
    logits, numbers = _logits(1, vocab=20, spread=2.0), (np.arange(40) + 0.5) / 40
    drawn = KERNELS.draw(logits.expand(40, -1).contiguous(), list(range(40)), [shape] * 40, numbers)
    expected = final_probabilities(logits, [shape])[0].numpy() * 40
    assert np.abs(np.bincount(drawn, minlength=20) - expected).max() <= 1.0


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), pytest.param(3, 0.4, marks=pytest.mark.slow)])
def test_equal_logits_are_all_kept(top_k, top_p):
    """Ties with the least likely kept token are kept, so of equal logits all are; more than a list can hold."""
    logits = torch.full((3, 1500), 1.5)
    numbers = np.array([0.0, 0.5, 0.9999])
    drawn = KERNELS.draw(logits, [0, 1, 2], [Shape(top_k=top_k, top_p=top_p)] * 3, numbers)
    assert drawn.tolist() == [0, 750, 1499]


def test_nucleus_of_exactly_half():
    """Tokens of 1/2, 1/4, 1/8, 1/8: the second is left out of 0.5, and let in by the least bit more."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().expand(2, -1).contiguous()
    exactly, more = 0.5, float(np.nextafter(np.float32(0.5), np.float32(1)))
    drawn = KERNELS.draw(logits, [0, 1], [Shape(top_p=exactly), Shape(top_p=more)], np.array([0.9, 0.9]))
    assert drawn.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("values", "greedy", "drawn"),
    [
        ([1.0, float("nan"), 2.0], -1, -1),
        ([1.0, -float("nan"), 2.0], -1, -1),
        ([1.0, float("inf"), 2.0], -1, -1),
        ([-float("inf")] * 3, -1, -1),
        ([-float("inf"), -3e38, -float("inf")], 1, 1),
        ([1e-45, 3e-45, 0.0], 1, 2),
        ([-0.0, 0.0, -1.0], 0, 1),
        ([3e38, -3e38, 3e38], 0, 2),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in subtract")  # the weight is 0 all the same
def test_extreme_rows(values, greedy, drawn):
    """NaN and +inf are no distribution, whatever sign; a -inf is a token that never comes; zeros are equal."""
    logits = torch.tensor([values, values])
    columns = columns_of([Shape(0.0), Shape()], [1, 1], [0, 0], [0, 0], "cpu")
    tokens = KERNELS.sample(logits.clone(), columns, SamplingMode.TRUNCATED)
    assert tokens.tolist() == sample_rows(logits, columns, SamplingMode.TRUNCATED).tolist()
    assert int(tokens[0]) == greedy
    # 0.7 of three nearly equal tokens is the last, of -0 and 0 (0.42 each) and e^-1 the second
    assert KERNELS.draw(logits, [1], [Shape()], np.array([0.7])).tolist() == [drawn]


def test_argmax_counts_nan_as_the_largest_and_takes_the_first():
    logits = torch.tensor([[1.0, 5.0, 5.0], [9.0, float("nan"), float("inf")], [-1.0, -1.0, -2.0]])
    best, peaks = KERNELS.argmax(logits)
    assert best.tolist() == [1, 1, 0]
    assert np.array_equal(peaks, np.array([5.0, np.nan, -1.0], dtype=np.float32), equal_nan=True)


def test_argmax_over_parts():
    logits = torch.zeros(2, VOCAB)
    logits[0, 8999], logits[1, 4096] = 1.0, 1.0
    assert KERNELS.argmax(logits)[0].tolist() == [8999, 4096]


def test_rows_alone_and_in_company():
    """A row's token does not depend on the other rows, on its place, or on a mode that offers too much."""
    shapes = [Shape(0.0), Shape(), Shape(top_k=9), Shape(2.0, top_p=0.9), Shape(1.3), Shape(min_p=0.1)]
    logits, columns = _logits(6), _columns(shapes)
    whole = KERNELS.sample(logits.clone(), columns, SamplingMode.TRUNCATED)
    order = torch.tensor([3, 0, 5, 2, 4, 1])
    shuffled = KERNELS.sample(logits[order], SamplingColumns(*(c[order] for c in columns)), SamplingMode.TRUNCATED)
    assert torch.equal(shuffled, whole[order])
    for row, mode in [(0, SamplingMode.GREEDY), (1, SamplingMode.RANDOM), (4, SamplingMode.RANDOM)]:
        alone = KERNELS.sample(logits[row : row + 1], SamplingColumns(*(c[row : row + 1] for c in columns)), mode)
        assert int(alone) == int(whole[row])


def test_rows_of_a_larger_tensor():
    """Padding of the head's output behind the vocabulary is not seen, and nothing is written."""
    wide = torch.full((3, VOCAB + 60), 1e9)
    wide[:, :VOCAB] = _logits(3)
    given = wide.clone()
    tokens = KERNELS.sample(wide[:, :VOCAB], _columns([Shape(top_k=30)] * 3), SamplingMode.TRUNCATED)
    assert tokens.tolist() == draw_rows(_logits(3), [0, 1, 2], [Shape(top_k=30)] * 3, _numbers(3)).tolist()
    assert torch.equal(wide, given)


def test_uniform_numbers_are_the_hosts():
    """Two equal tokens tell on which side of a half the number lies, over seeds and positions of every size."""
    seeds = [0, 1, 2**31, 2**32 + 7, 2**63, 2**64 - 1, 123456789012345678, 42] * 6
    indices, positions = [index % 4 for index in range(48)], [(7919 * index) % 131072 for index in range(48)]
    columns = columns_of([Shape()] * 48, seeds, indices, positions, "cpu")
    logits = torch.zeros(48, 4096)
    expected = np.floor(uniform(seeds, indices, positions) * 4096).astype(int)
    assert KERNELS.sample(logits, columns, SamplingMode.RANDOM).tolist() == expected.tolist()


def test_no_rows():
    assert KERNELS.sample(_logits(0), _columns([]), SamplingMode.TRUNCATED).shape == (0,)
    assert KERNELS.argmax(_logits(0))[0].shape == (0,)

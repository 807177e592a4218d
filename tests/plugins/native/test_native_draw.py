"""Native draws against the reference distribution: frequencies over a grid of numbers, and what is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interlace.interfaces.kernels import KernelSpec
from interlace.plugins.kernels.native import NativeKernels
from interlace.plugins.native.library import supported_isas
from interlace.sampling.distribution import Shape, draw_rows, final_probabilities

GRID = 4000


@pytest.fixture(params=supported_isas())
def kernels(request):
    return NativeKernels(NativeKernels.Options(isa=request.param), KernelSpec("float32", "cpu"))


def logits_of(kind: str, vocab: int = 1003) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    row = torch.randn(1, vocab, generator=generator)
    if kind == "peaked":
        return row * 6
    if kind == "tied":
        return (row * 2).round()
    if kind == "masked":
        row[0, torch.randperm(vocab, generator=generator)[: vocab - 20]] = -torch.inf
    return row


SHAPES = [
    Shape(),
    Shape(temperature=0.3),
    Shape(temperature=5.0),
    Shape(top_k=1),
    Shape(top_k=7),
    Shape(top_k=900),
    Shape(top_p=0.01),
    Shape(top_p=0.5),
    Shape(top_p=0.999),
    Shape(min_p=0.2),
    Shape(temperature=0.8, top_k=40, top_p=0.9),
    Shape(temperature=1.3, top_k=300, top_p=0.7, min_p=0.01),
]


@pytest.mark.parametrize("kind", ["flat", "peaked", "tied", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frequencies_are_the_probabilities(kernels, kind, shape):
    logits = logits_of(kind)
    expected = final_probabilities(logits.clone(), [shape])[0].numpy()
    uniforms = (np.arange(GRID) + 0.5) / GRID
    drawn = kernels.draw(logits.clone(), [0] * GRID, [shape] * GRID, uniforms)
    found = np.bincount(drawn, minlength=expected.size) / GRID
    # A grid point may fall to either side of a border; single and double precision move borders by less than that.
    assert np.abs(np.cumsum(found) - np.cumsum(expected)).max() < 1.5 / GRID
    assert np.all(expected[np.unique(drawn)] > 0), "an excluded token was drawn"
    assert np.all(np.diff(drawn) >= 0), "larger numbers give later tokens"


def test_nearly_every_token_is_that_of_the_reference(kernels):
    """Only numbers that fall on the border of two tokens may give a neighbour."""
    generator = np.random.default_rng(1)
    logits = torch.randn(64, 5000) * 3
    shapes = [SHAPES[i % len(SHAPES)] for i in range(64)]
    uniforms = generator.random(64)
    expected = draw_rows(logits.clone(), list(range(64)), shapes, uniforms)
    drawn = kernels.draw(logits.clone(), list(range(64)), shapes, uniforms)
    assert (drawn == expected).mean() > 0.95


def test_rows_are_chosen_by_number_and_do_not_see_each_other(kernels):
    logits = torch.randn(5, 300)
    uniforms = np.array([0.3, 0.9])
    pair = kernels.draw(logits, [4, 1], [Shape(), Shape(top_p=0.8)], uniforms)
    assert pair[0] == kernels.draw(logits[4:5].clone(), [0], [Shape()], uniforms[:1])[0]
    assert pair[1] == kernels.draw(logits[1:2].clone(), [0], [Shape(top_p=0.8)], uniforms[1:])[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_distribution_gives_no_token(kernels, value):
    logits = torch.randn(3, 70)
    logits[1, 69] = value
    drawn = kernels.draw(logits, [0, 1, 2], [Shape()] * 3, np.array([0.5, 0.5, 0.5]))
    assert drawn[1] == -1 and drawn[0] >= 0 and drawn[2] >= 0
    nothing = torch.full((1, 70), -torch.inf)
    assert kernels.draw(nothing, [0], [Shape()], np.array([0.5])).tolist() == [-1]


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1.0, 0.0)])
def test_the_ends_of_the_range_give_tokens_that_can_be(kernels, uniform):
    logits = logits_of("masked")
    token = kernels.draw(logits.clone(), [0], [Shape(top_p=0.9)], np.array([uniform]))[0]
    assert torch.isfinite(logits[0, token])


def test_a_vocabulary_beyond_the_scratch_memory_is_left_to_the_reference(kernels):
    logits = torch.zeros(1, 500_001)
    logits[0, 400_000] = 50.0
    assert kernels.draw(logits, [0], [Shape()], np.array([0.5])).tolist() == [400_000]

"""Truncation and drawing against transformers' processors and against independent float64 arithmetic."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from interlace.sampling.distribution import Shape, draw, final_probabilities, truncate
from interlace.sampling.random import uniform


def reference(row, shape):
    """The documented definition on one row, in float64 numpy, by sorting everything."""
    logits = np.asarray(row, dtype=np.float64) / shape.temperature
    weights = np.exp(logits - logits.max())
    kept = weights >= shape.min_p
    if 0 < shape.top_k < len(weights):
        kept &= logits >= np.sort(logits)[-shape.top_k]
    weights = np.where(kept, weights, 0.0)
    weights /= weights.sum()
    if shape.top_p < 1.0:
        ordered = np.sort(weights)[::-1]
        before = np.cumsum(ordered) - ordered
        least = ordered[np.flatnonzero(before < shape.top_p)[-1]]
        weights = np.where(weights >= least, weights, 0.0)
    return weights / weights.sum()


def hugging_face(logits, shape):
    """The same by transformers' warpers, in the order of our pipeline."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(shape.temperature))])
    if shape.min_p > 0:
        warpers.append(MinPLogitsWarper(shape.min_p))
    if shape.top_k > 0:
        warpers.append(TopKLogitsWarper(shape.top_k))
    if shape.top_p < 1:
        warpers.append(TopPLogitsWarper(shape.top_p))
    return torch.softmax(warpers(torch.zeros((len(logits), 1), dtype=torch.long), logits.double()), dim=-1)


def assert_same_distribution(ours, theirs, slack=2e-6):
    """Same kept tokens and probabilities. On the edge of a threshold, float32 rounding may decide otherwise: one
    token, or several of together no more than `slack`."""
    strays = (ours > 0) != (theirs > 0)
    stray_mass = float((ours + theirs)[strays].sum())
    assert int(strays.sum()) <= 1 or stray_mass <= slack, f"{int(strays.sum())} tokens of mass {stray_mass} differ"
    if stray_mass > slack:  # all the others are scaled by it
        slack += stray_mass
    assert (ours - theirs).abs().max() < slack


SHAPES = [
    Shape(temperature=0.7),
    Shape(temperature=1.7),
    Shape(top_k=1),
    Shape(top_k=5),
    Shape(top_k=50),
    Shape(top_k=63),
    Shape(top_k=64),
    Shape(top_k=255),
    Shape(top_k=300),
    Shape(top_p=0.1),
    Shape(top_p=0.5),
    Shape(top_p=0.9),
    Shape(top_p=0.999),
    Shape(min_p=0.01),
    Shape(min_p=0.2),
    Shape(min_p=1.0),
    Shape(top_k=40, top_p=0.9),
    Shape(top_k=400, top_p=0.95, temperature=2.0),
    Shape(top_p=0.9, min_p=0.02),
    Shape(temperature=0.8, top_k=50, top_p=0.95, min_p=0.05),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("vocab", "scale"), [(1000, 3.0), (8192, 1.0), (8192, 6.0), (40007, 3.0)])
def test_distribution_equals_transformers_and_float64(shape, vocab, scale):
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab)) * scale
    ours = final_probabilities(logits, [shape] * 4)
    theirs = hugging_face(logits, shape)
    for row in range(4):
        assert_same_distribution(ours[row], theirs[row])
        assert_same_distribution(ours[row], torch.from_numpy(reference(logits[row], shape)))


def test_rows_of_all_shapes_together_equal_each_alone_bit_for_bit():
    logits = torch.randn(len(SHAPES), 8192, generator=torch.Generator().manual_seed(3)) * 4
    together = final_probabilities(logits, SHAPES)
    for row, shape in enumerate(SHAPES):
        assert torch.equal(final_probabilities(logits[row : row + 1], [shape])[0], together[row])


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        (Shape(top_k=2), {1, 2, 3}),  # 2 and 3 tie for the second place
        (Shape(top_p=0.6), {1, 2, 3}),
        (Shape(min_p=0.9), {1}),
        (Shape(top_k=1), {1}),
    ],
)
def test_tokens_that_tie_with_the_least_likely_kept_one_are_kept(shape, kept):
    logits = torch.tensor([[0.0, 3.0, 2.0, 2.0, -1.0]])
    assert set(torch.nonzero(final_probabilities(logits, [shape])[0]).flatten().tolist()) == kept


@pytest.mark.parametrize("shape", [Shape(top_k=3), Shape(top_k=50), Shape(top_p=0.5), Shape(top_k=3, top_p=0.5)])
def test_a_tie_longer_than_the_candidates_keeps_every_token(shape):
    logits = torch.zeros(1, 5000)
    probabilities = final_probabilities(logits, [shape])
    assert torch.allclose(probabilities, torch.full_like(probabilities, 1 / 5000), atol=1e-9)


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-3])
def test_tiny_temperature_is_greedy(temperature):
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) * 50
    probabilities = final_probabilities(logits, [Shape(temperature=temperature, top_p=0.99)] * 3)
    assert torch.equal(probabilities.argmax(dim=1), logits.argmax(dim=1))
    assert torch.allclose(probabilities.amax(dim=1), torch.ones(3, dtype=torch.float64))


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 2**31),
            st.floats(0.05, 5.0),
            st.sampled_from([0, 1, 2, 7, 30, 64, 100, 256, 5000]),
            st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
            st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
        ),
        min_size=1,
        max_size=5,
    ),
    vocab=st.sampled_from([1, 2, 17, 300, 2049]),
    levels=st.sampled_from([3, 40, 10**6]),
)
@settings(max_examples=60, deadline=None)
def test_random_mixes_keep_the_mass_and_the_order(rows, vocab, levels):
    """Coarsely rounded logits make ties. What is kept is a top set, holds the mass asked for, and is minimal."""
    shapes = [Shape(t, k, p, m) for _, t, k, p, m in rows]
    logits = torch.stack([torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) for seed, *_ in rows])
    logits = (logits * levels / 4).round() * 4 / levels
    result = final_probabilities(logits, shapes)
    for row, shape in enumerate(shapes):
        probabilities = result[row]
        assert math.isclose(float(probabilities.sum()), 1.0, abs_tol=1e-9)
        before_top_p = torch.from_numpy(reference(logits[row], shape._replace(top_p=1.0)))
        kept = probabilities > 0
        assert float(before_top_p[kept].sum()) >= min(shape.top_p, 1.0) - 1e-5
        more_likely = before_top_p > before_top_p[kept].min() * (1 + 1e-6)
        assert float(before_top_p[more_likely].sum()) < shape.top_p + 1e-5
        if shape.top_p == 1.0:  # nothing on the edge of a sum
            assert (probabilities - before_top_p).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [Shape(), Shape(temperature=0.6), Shape(top_k=20), Shape(top_p=0.8)], ids=str)
@pytest.mark.parametrize("vocab", [50, 700])
def test_drawn_tokens_follow_the_distribution(shape, vocab):
    """Chi-square of 20,000 draws over the tokens with an expectation of at least 5, within 4 standard deviations."""
    count = 20_000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    expected = final_probabilities(logits, [shape])[0].numpy() * count
    (group,) = truncate(logits.clone(), [shape])
    numbers = torch.from_numpy(uniform([9] * count, [0] * count, range(count)))
    repeated = group._replace(
        token_ids=None if group.token_ids is None else group.token_ids.expand(count, -1),
        weights=group.weights.expand(count, -1),
    )
    tokens, valid = draw(repeated, numbers)
    observed = np.bincount(tokens.numpy(), minlength=vocab)
    assert bool(valid.all())
    assert observed[expected == 0].sum() == 0
    common = expected >= 5
    cells = [*zip(observed[common], expected[common], strict=True), (observed[~common].sum(), expected[~common].sum())]
    statistic = sum((o - e) ** 2 / e for o, e in cells if e > 0)
    degrees = int(common.sum())
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("vocab", [1, 5, 256, 257, 1000])
@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_draw_is_the_inverse_cdf_and_never_gives_an_excluded_token(vocab, number):
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[0, ::3] = -math.inf
    if vocab == 1:
        logits[0, 0] = 1.0
    (group,) = truncate(logits.clone(), [Shape()])
    token = int(draw(group, torch.tensor([number], dtype=torch.float64))[0][0])
    probabilities = final_probabilities(logits, [Shape()])[0]
    assert probabilities[token] > 0
    cdf = probabilities.cumsum(0)
    assert float(cdf[token]) >= number - 1e-6
    assert float(cdf[token] - probabilities[token]) <= number + 1e-6


def test_the_token_does_not_depend_on_how_it_was_found():
    """Whole vocabulary, sorted row and candidates all walk in order of token id."""
    logits = torch.randn(1, 4000, generator=torch.Generator().manual_seed(5)) * 8
    for number in np.linspace(0.01, 0.99, 40):
        u = torch.tensor([number], dtype=torch.float64)
        found = set()
        for shape in (Shape(), Shape(top_k=63), Shape(top_k=3000), Shape(top_p=1 - 1e-7)):
            (group,) = truncate(logits.clone(), [shape])
            found.add(int(draw(group, u)[0][0]))
        assert len(found) == 1


def test_bad_rows_are_reported_and_leave_the_others_alone():
    logits = torch.randn(8, 600, generator=torch.Generator().manual_seed(1))
    good = final_probabilities(logits, [Shape(), Shape(top_k=4)] * 4)
    broken = logits.clone()
    broken[0, 7], broken[1, 7] = math.nan, math.nan
    broken[2], broken[3] = -math.inf, -math.inf
    broken[4, 9], broken[5, 9] = math.inf, math.inf
    for group in truncate(broken.clone(), [Shape(), Shape(top_k=4)] * 4):
        valid = draw(group, torch.full((len(group.rows),), 0.5, dtype=torch.float64))[1].tolist()
        assert dict(zip(group.rows, valid, strict=True)) == {row: row >= 6 for row in group.rows}
    assert torch.equal(final_probabilities(broken, [Shape(), Shape(top_k=4)] * 4)[6:], good[6:])

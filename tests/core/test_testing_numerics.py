"""Divergence from float32, and what each way of keeping weights may cost on real text."""

from __future__ import annotations

import gc

import pytest
import torch

from interlace.engine.startup import paused_gc
from interlace.testing.numerics import compare, measure


def test_equal_logits_do_not_diverge_and_others_do():
    logits, targets = torch.randn(5, 11), torch.tensor([0, 3, 10, 2, 2])
    divergence, same, loss, expected = compare(logits, logits + 4.0, targets)  # a shift changes no distribution
    assert divergence.abs().max() < 1e-6 and same.all()
    assert torch.allclose(loss, expected)
    assert torch.allclose(expected.float(), torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    divergence, same, _, _ = compare(logits, -logits, targets)
    assert (divergence > 0).all() and not same.any()


@pytest.mark.slow
def test_ways_of_keeping_weights_stay_near_float32():
    text = "The capital of France is Paris. Water boils at one hundred degrees, and freezes at zero. " * 2
    ways = ["bf16", "as-shipped", "float32 compute, bf16"]
    found = {result.way: result for result in measure("smollm2", [text], 64, ways)}
    assert found["float32 compute, bf16"].kl_mean < found["bf16"].kl_mean < 0.01
    assert found["as-shipped"].kl_mean < 0.03
    assert all(result.agreement > 0.85 for result in found.values())


def test_garbage_collection_pauses_and_comes_back():
    with pytest.raises(KeyError), paused_gc():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    with paused_gc():
        made = [[number] for number in range(5000)]
    young = {id(item) for item in gc.get_objects(generation=0)}
    assert not young.intersection(map(id, made)), "what stays is looked through at once"
    assert any(item is made[0] for item in gc.get_objects(generation=2)) and gc.get_freeze_count() <= frozen
    gc.disable()
    try:
        with paused_gc():
            pass
        assert not gc.isenabled(), "who has turned it off keeps it off"
    finally:
        gc.enable()

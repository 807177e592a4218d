"""Attention `torch`: what is its own. See test_attention_conformance.py for what every backend must do."""

from __future__ import annotations

import random

import pytest
import torch

from interlace.interfaces.attention import AttentionSpec
from interlace.plugins.attention import interlace_attention
from interlace.plugins.attention import torch as implementation
from interlace.plugins.attention.torch import TorchAttention
from interlace.testing.attention_suite import PagedAttention
from interlace.testing.reference import dense_attention


def test_the_reference_is_right_where_it_can_be_done_by_hand():
    """Two tokens, one head, all scores zero: the second sees the mean of both values."""
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_size=2)
    value = torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]])
    out = dense_attention(spec, torch.zeros(2, 1, 2), torch.ones(2, 1, 2), value)
    assert out.tolist() == [[[1.0, 2.0]], [[2.0, 4.0]]]
    window = AttentionSpec(num_heads=1, num_kv_heads=1, head_size=2, kind="window", window=1)
    assert dense_attention(window, torch.zeros(2, 1, 2), torch.ones(2, 1, 2), value).tolist() == value.tolist()


@pytest.mark.parametrize("window", [0, 20])
def test_chunk_limits_change_nothing(monkeypatch, window):
    """Small limits cut decode rows and prefill queries into many chunks."""
    torch.manual_seed(0)
    monkeypatch.setattr(implementation, "_MAX_GATHERED", 64)
    monkeypatch.setattr(implementation, "_MAX_QUERIES", 8)
    spec = AttentionSpec(4, 2, 16, kind="window" if window else "full", window=window)
    paged = PagedAttention(TorchAttention, spec, block_size=16)
    prefill = {"a": 50, "b": 49, "c": 3, "d": 100, "e": 2}
    for lengths in (prefill, dict.fromkeys(prefill, 1), {"a": 23, "b": 1, "f": 45, "d": 3, "c": 1}):
        assert paged.step(lengths) < 1e-5


def test_gathers_are_bounded_and_padding_is_at_most_double(monkeypatch):
    monkeypatch.setattr(implementation, "_MAX_GATHERED", 1000)
    backend = PagedAttention(TorchAttention, AttentionSpec(1, 1, 8), block_size=16).backend
    assert isinstance(backend, TorchAttention)
    rng = random.Random(3)
    lengths = sorted((rng.randint(1, 400) for _ in range(100)), reverse=True)
    chunks = backend._cut(lengths, list(range(100)))
    assert [row for chunk in chunks for row in chunk] == list(range(100))
    for chunk in chunks:
        assert lengths[chunk[0]] * len(chunk) <= 1000
        assert lengths[chunk[0]] <= 2 * lengths[chunk[-1]]


def test_supports():
    full = AttentionSpec(num_heads=1, num_kv_heads=1, head_size=7)
    assert TorchAttention.supports(full, 16, "bfloat16", "cpu") is None
    assert "empty" in (TorchAttention.supports(AttentionSpec(1, 1, 8, kind="window"), 16, "float32", "cpu") or "")
    assert "not in int8" in (TorchAttention.supports(full, 16, "int8", "cpu") or "")


def test_provider_is_listed():
    provider, *_ = interlace_attention()
    assert provider.name == "torch" and provider.target == "interlace.plugins.attention.torch:TorchAttention"

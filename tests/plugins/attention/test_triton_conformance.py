"""The conformance suite of attention backends for `triton` and `triton_invariant`, in Triton's interpreter. That pays
milliseconds per program, so there are few seeds, and long contexts for one of the two only."""

from __future__ import annotations

from typing import ClassVar

import pytest

from interlace.testing.attention_suite import AttentionConformance


class OnInterpreter(AttentionConformance):
    seeds = range(2)
    block_sizes = (16, 32, 64)
    head_sizes = (5, 16, 40, 64)
    tolerances: ClassVar = {"float32": 1e-5, "float16": 5e-3}


@pytest.mark.slow
class TestTritonAttention(OnInterpreter):
    attention = "triton"


@pytest.mark.slow
class TestInvariantTritonAttention(OnInterpreter):
    attention = "triton_invariant"
    seeds = range(1)
    block_sizes = (32,)
    head_sizes = (16,)
    test_long_contexts = None  # hundreds of pieces

"""The conformance suite of attention backends for `flash`: prompts by SDPA, decoding in Triton's interpreter."""

from __future__ import annotations

from typing import ClassVar

import pytest

from interlace.testing.attention_suite import AttentionConformance


@pytest.mark.slow
class TestFlashAttention(AttentionConformance):
    attention = "flash"
    seeds = range(1)
    block_sizes = (16, 32)
    head_sizes = (8, 16, 40)
    tolerances: ClassVar = {"float32": 1e-5, "float16": 5e-3}

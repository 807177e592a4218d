"""`native` attention passes the conformance suite with every instruction set and every way of keeping the cache."""

from __future__ import annotations

from typing import ClassVar

import pytest

from interlace.plugins.native.library import supported_isas
from interlace.testing.attention_suite import AttentionConformance

TOLERANCES = {"float32": 1e-5, "bfloat16": 4e-2}


class TestNativeAttention(AttentionConformance):
    """The best this CPU has."""

    attention = "native"
    seeds = range(6)
    block_sizes = (16, 48, 32)
    head_sizes = (8, 16, 40, 256, 64)
    tolerances: ClassVar = TOLERANCES


class TestNativeAttentionAvx2(TestNativeAttention):
    pytestmark: ClassVar = [pytest.mark.skipif("avx2" not in supported_isas(), reason="this CPU has no AVX2")]
    options: ClassVar = {"isa": "avx2"}


class TestNativeAttentionPortable(TestNativeAttention):
    options: ClassVar = {"isa": "portable"}


class TestNativeAttentionInt8(TestNativeAttention):
    options: ClassVar = {"kv_dtype": "int8"}
    tolerances: ClassVar = {"float32": 4e-2, "bfloat16": 6e-2}


@pytest.mark.slow
class TestNativeAttentionThoroughly(TestNativeAttention):
    seeds = range(60)

"""`native` kernels pass the conformance suite with every instruction set."""

from __future__ import annotations

from typing import ClassVar

import pytest

from interlace.plugins.native.library import supported_isas
from interlace.testing.kernels_suite import KernelsConformance


class TestNativeKernels(KernelsConformance):
    """The best this CPU has."""

    kernels = "native"
    seeds = range(5)
    tolerances: ClassVar = {"float32": 1e-5, "bfloat16": 2e-2}


class TestNativeKernelsAvx2(TestNativeKernels):
    pytestmark: ClassVar = [pytest.mark.skipif("avx2" not in supported_isas(), reason="this CPU has no AVX2")]
    options: ClassVar = {"isa": "avx2"}


class TestNativeKernelsPortable(TestNativeKernels):
    options: ClassVar = {"isa": "portable"}


@pytest.mark.slow
class TestNativeKernelsThoroughly(TestNativeKernels):
    seeds = range(40)

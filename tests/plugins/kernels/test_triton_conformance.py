"""`triton` kernels pass the conformance suite in Triton's interpreter."""

from __future__ import annotations

from typing import ClassVar

import pytest

from interlace.testing.kernels_suite import KernelsConformance


class TestTritonKernels(KernelsConformance):
    kernels = "triton"
    seeds = range(1)
    # The interpreter rounds bfloat16 towards zero.
    tolerances: ClassVar = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 3e-2}


@pytest.mark.slow
class TestTritonKernelsThoroughly(TestTritonKernels):
    seeds = range(3, 8)  # with 2, 9 and 40 rows

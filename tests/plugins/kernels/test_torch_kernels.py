"""Kernels `torch`: what is its own. See test_kernels_conformance.py for what every kernel set must do."""

from __future__ import annotations

import pytest
import torch

from interlace.interfaces.kernels import Kernels, KernelSpec
from interlace.plugins.kernels import interlace_kernels
from interlace.plugins.kernels.torch import TorchKernels


def make(dtype: str) -> TorchKernels:
    return TorchKernels(TorchKernels.Options(), KernelSpec(dtype, "cpu"))


def test_linear_keeps_no_view_of_what_it_was_given():
    weight = torch.randn(6, 4)
    x = torch.randn(2, 4)
    expected = x @ weight.T
    linear = make("float32").make_linear(weight)
    weight.zero_()
    assert torch.allclose(linear(x), expected, atol=1e-5)


@pytest.mark.parametrize("weights", ["int8", "as-shipped"])
def test_other_ways_of_keeping_weights_are_refused_with_a_reason(weights):
    spec = KernelSpec("float32", "cpu", weights)
    for kernels in (Kernels, TorchKernels):
        reason = kernels.supports("make_linear", spec)
        assert reason is not None and f"not as '{weights}'" in reason
        assert kernels.supports("rms_norm", spec) is None


def test_start_up_can_say_how_linears_run(monkeypatch):
    assert make("float32").describe("make_linear") == "prepacked oneDNN, weights in float32"
    assert make("float32").describe("rms_norm") == "torch reference"

    def refuse(*args):
        raise RuntimeError("no such instructions")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    fallback = make("bfloat16")
    assert fallback.describe("make_linear") == (
        "torch.nn.functional.linear, weights in bfloat16 (oneDNN does not pack bfloat16 on this CPU)"
    )
    weight, x = torch.randn(6, 4), torch.randn(2, 4).bfloat16()
    assert torch.equal(fallback.make_linear(weight)(x), torch.nn.functional.linear(x, weight.bfloat16()))


def test_what_is_batch_invariant():
    assert set(TorchKernels.batch_invariant) == {"embedding", "rope"}


def test_provider_is_listed():
    targets = {provider.name: provider.target for provider in interlace_kernels()}
    assert targets["torch"] == "interlace.plugins.kernels.torch:TorchKernels"

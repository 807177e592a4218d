"""Kernels `torch` against the reference of the contract, and its ways of keeping weights."""

from __future__ import annotations

import pytest
import torch

from interlace.interfaces.kernels import Kernels, KernelSpec
from interlace.plugins.kernels import interlace_kernels
from interlace.plugins.kernels.torch import TorchKernels

DTYPES = ["float32", "bfloat16", "float16"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


def make(dtype: str, weights: str = "auto") -> TorchKernels:
    return TorchKernels(TorchKernels.Options(), KernelSpec(dtype, "cpu", weights))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8, 64, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype, rows, bias):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(40, 24, generator=generator)
    offset = torch.randn(40, generator=generator) if bias else None
    x = torch.randn(rows, 24, generator=generator).to(getattr(torch, dtype))
    linear = make(dtype).make_linear(weight, offset)
    result = linear(x)
    assert result.dtype == x.dtype and result.shape == (rows, 40)
    kept = weight.to(x.dtype).double()
    expected = x.double() @ kept.T + (0 if offset is None else offset.to(x.dtype).double())
    assert (result.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_linear_takes_slices_and_no_rows():
    weight = torch.randn(6, 4)
    linear = make("float32").make_linear(weight)
    wide = torch.randn(3, 9)
    assert torch.allclose(linear(wide[:, 2:6]), wide[:, 2:6] @ weight.T, atol=1e-5)
    assert linear(wide[:0, :4]).shape == (0, 6)


def test_linear_keeps_no_view_of_what_it_was_given():
    weight = torch.randn(6, 4)
    x = torch.randn(2, 4)
    expected = x @ weight.T
    linear = make("float32").make_linear(weight)
    weight.zero_()
    assert torch.allclose(linear(x), expected, atol=1e-5)


@pytest.mark.parametrize(("dtype", "weights"), [("float32", "bf16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("kernels", [TorchKernels, Kernels])
def test_weights_kept_in_another_type(kernels, dtype, weights):
    spec = KernelSpec(dtype, "cpu", weights)
    assert kernels.supports("make_linear", spec) is None
    weight = torch.randn(16, 8)
    x = torch.randn(4, 8).to(getattr(torch, dtype))
    result = kernels(kernels.Options(), spec).make_linear(weight)(x)
    assert result.dtype == x.dtype
    kept = weight if weights == "float32" else weight.bfloat16().float()
    assert (result.float() - x.float() @ kept.T).abs().max() < 0.05


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


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype, unit_offset):
    kernels = make(dtype)
    torch_dtype = getattr(torch, dtype)
    x, residual = torch.randn(3, 16).to(torch_dtype), torch.randn(3, 16).to(torch_dtype)
    weight = torch.randn(16).to(torch_dtype)
    total = (x + residual).double()
    scale = weight.double() + unit_offset
    expected = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale
    normed, new_residual = kernels.add_rms_norm(x, residual.clone(), weight, 1e-5, unit_offset)
    assert torch.equal(new_residual.double(), total)
    assert (normed.double() - expected).abs().max() < TOLERANCE[dtype] * 4
    assert torch.equal(kernels.rms_norm(new_residual, weight, 1e-5, unit_offset), normed)


def test_gated_activations():
    kernels = make("float32")
    gate_up = torch.randn(3, 10)
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    assert torch.allclose(kernels.silu_mul(gate_up), gate * gate.sigmoid() * up, atol=1e-6)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    assert torch.allclose(kernels.gelu_mul(gate_up), 0.5 * gate * (1 + inner.tanh()) * up, atol=1e-6)


def test_ops_that_claim_it_are_batch_invariant():
    kernels = make("float32")
    assert set(kernels.batch_invariant) == {"embedding", "rope"}
    query, key, table = torch.randn(9, 3, 6), torch.randn(9, 1, 6), torch.randn(20, 6)
    positions = torch.arange(9)
    whole = kernels.rope(query, key, positions, table)
    weight = torch.randn(20, 7)
    for row in range(9):
        one = slice(row, row + 1)
        alone = kernels.rope(query[one], key[one], positions[one], table)
        assert torch.equal(alone[0], whole[0][one]) and torch.equal(alone[1], whole[1][one])
        assert torch.equal(kernels.embedding(positions[one], weight), kernels.embedding(positions, weight)[one])


def test_provider_is_listed():
    (provider,) = interlace_kernels()
    assert provider.name == "torch" and provider.target == "interlace.plugins.kernels.torch:TorchKernels"

"""A gate that became part of the product before it gives the bits of the two ops, in every form of the weights."""

from __future__ import annotations

import pytest
import torch

from interlace.interfaces.kernels import KernelSpec
from interlace.interfaces.weights import BlockWeight
from interlace.plugins.kernels.native import NativeKernels
from interlace.plugins.native.library import LINEAR, SILU_MUL, Op, Step
from interlace.plugins.native.program import name_of

WEIGHTS = ["float32", "bf16", "int8", "blocks"]


def make(isa, weights, dtype, size, width):
    """Kernels, and a linear layer of them: `size` inputs, gate and up of `width` outputs each."""
    spec = KernelSpec(dtype, "cpu", "as-shipped" if weights == "blocks" else weights)
    kernels = NativeKernels(NativeKernels.Options(isa=isa), spec)
    torch.manual_seed(size + width)
    if weights != "blocks":
        return kernels, kernels.make_linear(torch.randn(2 * width, size), torch.randn(2 * width))
    scales = torch.rand(2 * width, size // 32, 1).half().view(torch.uint8)
    quants = torch.randint(0, 256, (2 * width, size // 32, 32), dtype=torch.uint8)
    data = torch.cat((scales, quants), dim=2).flatten(1)
    return kernels, kernels.make_block_linear([blocks(data[:width], size), blocks(data[width:], size)])


def blocks(data, size):
    return BlockWeight("Q8_0", (data.shape[0], size), data, decode=NotImplemented, block_values=32)


def record(kernels, linear, gate, x):
    """The ops of gate(linear(x)) and something after it, and the tensor of the former."""
    rows = x.shape[0]
    with torch.inference_mode(), kernels._tape.recording(rows, rows + 1, []) as ops:
        out = gate(linear(x))
        kernels.scale(out, 1.0)
    return list(ops), out


def run(kernels, ops, rows):
    kernels._tape.library.run((Op * len(ops))(*ops), len(ops), Step(num_tokens=rows))


@pytest.mark.parametrize("gate", ["silu_mul", "gelu_mul"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_same_bits(isa, weights, gate, use_threads):
    use_threads(2)
    for dtype in ("float32", "bfloat16"):
        kernels, linear = make(isa, weights, dtype, size=96, width=192)
        for rows in (1, 7, 64, 333):
            x = torch.randn(rows, 96).to(getattr(torch, dtype))
            expected = getattr(kernels, gate)(linear(x))
            ops, out = record(kernels, linear, getattr(kernels, gate), x)
            assert [name_of(op) for op in ops] == ["gated linear", "scale"]
            run(kernels, ops, rows)
            assert torch.equal(out, expected)


def test_halves_whose_panels_do_not_match_stay_two_ops(isa):
    kernels, linear = make(isa, "bf16", "bfloat16", size=32, width=40)  # 80 outputs: no panel ends at the 40th
    x = torch.randn(5, 32).bfloat16()
    expected = kernels.silu_mul(linear(x))
    ops, out = record(kernels, linear, kernels.silu_mul, x)
    assert [op.code for op in ops[:2]] == [LINEAR, SILU_MUL]
    run(kernels, ops, 5)
    assert torch.equal(out, expected)


def test_a_product_that_is_read_again_stays():
    kernels, linear = make("auto", "bf16", "bfloat16", size=32, width=96)
    x = torch.randn(5, 32).bfloat16()
    with torch.inference_mode(), kernels._tape.recording(5, 6, []) as ops:
        both = linear(x)
        gated = kernels.silu_mul(both)
        again = kernels.scale(both, 2.0)
    assert [name_of(op) for op in ops] == ["linear", "silu_mul", "scale"]
    run(kernels, list(ops), 5)
    assert torch.equal(again, kernels.scale(linear(x), 2.0))
    assert torch.equal(gated, kernels.silu_mul(linear(x)))

"""Products with GGUF's blocks in C++, against the values that the gguf package decodes."""

from __future__ import annotations

import random

import gguf
import numpy as np
import pytest
import torch

from interlace.interfaces.kernels import KernelSpec
from interlace.interfaces.weights import BlockWeight
from interlace.plugins.kernels.native import NativeKernels
from interlace.plugins.native.library import Library, supported_isas
from interlace.plugins.native.linear import BLOCKS, NativeLinear
from interlace.plugins.native.tape import Tape

ISAS = supported_isas()
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
"""Where a block has float16 scales; all other bytes may be anything."""
ROUNDING = 3e-6
"""Error of float32 sums, relative to the size of a sum of that many products."""


def tape(isa, threads=1):
    return Tape(Library(threads, isa))


def decode(name):
    kind = gguf.GGMLQuantizationType[name]
    return lambda data: torch.from_numpy(gguf.quants.dequantize(data.numpy(), kind))


def make(name, rows, size, seed=0, spread=0.02):
    """Random blocks: every bit but those of the scales is random, so every value of a quant and a scale occurs."""
    rng = np.random.default_rng(seed)
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    data = rng.integers(0, 256, (rows, size // block, block_bytes), dtype=np.uint8)
    for place in HALVES[name]:
        scales = rng.normal(0, spread, (rows, size // block, 1)).astype(np.float16)
        data[:, :, place : place + 2] = scales.view(np.uint8)
    return BlockWeight(name, (rows, size), torch.from_numpy(data.reshape(rows, -1)), decode(name))


def scale_of(x, weight):
    return (x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1).amax() / x.shape[1] ** 0.5).clamp_min(
        1e-30
    )


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_values(isa, name, quantized):
    """The same as with decoded weights and activations rounded to 8 bits, up to float32's rounding; and near the exact
    product. Row strides, odd numbers of rows, any number of threads."""
    rng, generator = random.Random(name), torch.Generator().manual_seed(1)
    for rows, size in ((1, 256), (33, 512), (80, 768)):
        weight = make(name, rows, size, seed=rows)
        values = weight.dequantize()
        bias = torch.randn(rows, generator=generator) if rng.random() < 0.5 else None
        linear = NativeLinear(tape(isa, rng.choice([1, 2, 3])), [weight], "bf16", bias)
        extra = 0 if bias is None else bias.bfloat16().double()
        for count in (0, 1, 3, rng.choice([8, 9, 15]), rng.choice([64, 130])):
            x = torch.randn(count, size + 3, generator=generator)[:, 2:-1]
            got = linear(x).double()
            wanted = quantized(x, isa) @ values.double().T + extra
            scale = scale_of(x, values) + (0 if bias is None else bias.abs().amax())
            assert ((got - wanted).abs() <= ROUNDING * scale).all()
            exact = x.double() @ values.double().T + extra
            assert ((got - exact).abs() <= 0.04 * scale).all()
            narrow = linear(x.bfloat16()).double()
            wanted = quantized(x.bfloat16(), isa) @ values.double().T + extra
            assert ((narrow - wanted).abs() <= ROUNDING * scale + 2**-8 * wanted.abs()).all()


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_a_row_has_the_same_bits_in_any_company(isa, name):
    weight = make(name, 100, 768)
    x = torch.randn(40, 768, generator=torch.Generator().manual_seed(2))
    whole = NativeLinear(tape(isa), [weight], "bf16")(x)
    for threads in (1, 2, 3):
        linear = NativeLinear(tape(isa, threads), [weight], "bf16")
        for rows in (*range(1, 18), 40):
            first = (rows * 5) % (41 - rows)
            assert torch.equal(linear(x[first : first + rows]), whole[first : first + rows]), (rows, threads)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_an_output_has_the_same_bits_on_any_rank(isa, name):
    weight = make(name, 200, 512)
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(3)).bfloat16()
    whole = NativeLinear(tape(isa), [weight], "bf16")(x)
    for first, last in ((0, 100), (100, 200), (66, 133), (7, 8), (190, 200)):
        part = NativeLinear(tape(isa, 2), [weight[first:last]], "bf16")
        for rows in (1, 9):
            assert torch.equal(part(x[:rows]), whole[:rows, first:last]), (first, last, rows)


def test_parts_of_several_formats(isa):
    """As the fused query, key and value of a mixed file: each part gives what it gives alone."""
    parts = [make("Q4_K", 50, 256, 1), make("Q6_K", 16, 256, 2), make("Q8_0", 7, 256, 3), torch.randn(20, 256)]
    x = torch.randn(11, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    for keep in ("bf16", "float32"):
        together = NativeLinear(tape(isa, 2), parts, keep)(x)
        alone = [NativeLinear(tape(isa), [part], keep)(x) for part in parts]
        assert torch.equal(together, torch.cat(alone, dim=1))


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_extreme_values(isa, name, quantized):
    """Zero scales, tiny (denormal in float16) and large ones; activations that are zero, tiny, large, not finite."""
    weight = make(name, 32, 256, spread=1.0)
    block_bytes = weight.data.shape[1] * 32 // 256 if name[-1] != "K" else weight.data.shape[1]
    for row, scale in ((0, 0.0), (1, 6e-8), (2, 3e-6), (3, 6e4)):
        halves = np.array([scale], dtype=np.float16).view(np.uint8)
        for block in range(0, weight.data.shape[1], block_bytes):
            for place in HALVES[name]:
                weight.data[row, block + place : block + place + 2] = torch.from_numpy(halves)
    values = weight.dequantize().double()
    linear = NativeLinear(tape(isa), [weight], "bf16")
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(4))
    x[1], x[2], x[3] = 0, x[2] * 1e-20, x[3] * 1e20
    x[4, 5], x[5, 6] = torch.inf, torch.nan
    got, finite = linear(x), slice(0, 4)
    wanted = quantized(x[finite], isa) @ values.T
    size = x[finite].double().norm(dim=1, keepdim=True) * values.norm(dim=1) / 16
    assert ((got[finite].double() - wanted).abs() <= 1e-5 * size + 1e-33).all()
    assert (got[1] == 0).all()
    assert not got[4:].isfinite().any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_formats_without_a_kernel_are_decoded(dtype):
    """A part in such a format runs in the type of compute, next to parts that stay in blocks."""
    spec = KernelSpec(dtype, "cpu", "as-shipped")
    assert NativeKernels.supports("make_block_linear", spec) is None
    known = make("Q8_0", 32, 256)
    data = torch.from_numpy(
        gguf.quants.quantize(
            np.random.default_rng(0).normal(size=(20, 256)).astype(np.float32), gguf.GGMLQuantizationType.TQ2_0
        )
    )
    other = BlockWeight("TQ2_0", (20, 256), data, decode("TQ2_0"))
    linear = NativeKernels(NativeKernels.Options(), spec).make_block_linear([known, other])
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(5)).to(getattr(torch, dtype))
    values = torch.cat([known.dequantize(), other.dequantize()])
    error = (linear(x).double() - x.double() @ values.double().T).abs()
    assert (error[:, 32:] <= (2e-6 if dtype == "float32" else 1e-2) * scale_of(x, values[32:])).all()
    assert (error <= 4e-2 * scale_of(x, values)).all()


@pytest.mark.parametrize("weights", ["bf16", "int8", "float32"])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_blocks_that_are_not_kept_are_packed_as_decoded_values_are(isa, name, weights):
    """Bit for bit, without the decoded values ever being in memory as a whole. Several parts, some of them of formats
    that the kernels do not know, rows that do not fill a panel, inputs that do not fill a block of 256."""
    spec = KernelSpec("float32" if weights == "float32" else "bfloat16", "cpu", weights)
    kernels = NativeKernels(NativeKernels.Options(isa=isa), spec)
    size = 768 if name.endswith("K") else 352
    parts = [make(name, 70, size, 1), make("Q8_0", 33, size, 2), make(name, 1, size, 3)]
    parts.append(BlockWeight("OWN", (1, size), parts[2].data, parts[2].decode))
    bias = torch.randn(105, generator=torch.Generator().manual_seed(6))
    together = kernels.make_block_linear(parts, bias)
    values = torch.cat([part.dequantize(spec.decoded_dtype) for part in parts])
    alone = kernels.make_linear(values, bias)
    x = torch.randn(9, size, generator=torch.Generator().manual_seed(7)).to(getattr(torch, spec.dtype))
    assert torch.equal(together(x), alone(x))
    head, plain = kernels.make_head(parts), kernels.make_head(values)
    assert torch.equal(head(x), plain(x))


def test_packed_bytes(isa):
    """Blocks are hardly made larger: a byte for each scale of a K format that has six bits in the file."""
    for name in BLOCKS:
        weight = make(name, 64, 256)
        assert NativeLinear(tape(isa), [weight], "bf16").nbytes <= 1.03 * weight.data.numel() + 64, name


def test_refuses_parts_of_blocks(isa):
    cut = BlockWeight("Q8_0", (2, 40), torch.zeros(2, 43, dtype=torch.uint8), decode("Q8_0"))
    with pytest.raises(ValueError, match="40 inputs are no multiple of a block of 32"):
        NativeLinear(tape(isa), [cut], "bf16")

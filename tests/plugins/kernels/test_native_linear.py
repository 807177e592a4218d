"""Linear layers in C++: every way of keeping plain weights, on every instruction set this CPU has, against float64."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from interlace.interfaces.kernels import KernelSpec
from interlace.plugins.kernels.native import NativeKernels
from interlace.plugins.native.library import BF16, LINEAR, OUTPUTS, TOKENS, Library, Op, Step, make_op, supported_isas
from interlace.plugins.native.linear import WAYS, NativeLinear
from interlace.plugins.native.tape import Tape

ISAS = supported_isas()
KEEPS = ("bf16", "float32", "int8")
ROUNDING = 4e-7
"""Error of float32 results, relative to the size of a sum of that many products and to the root of their number."""
BF16_STEP = 2**-8


def tape(isa, threads=1):
    return Tape(Library(threads, isa))


@pytest.fixture
def reference(isa, quantized, int8_weight):
    """The product in float64 of what the kernel rounds x and the weight to."""

    def product(x, weight, keep, bias=None):
        if keep == "bf16":
            x, weight, bias = x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()
        if keep == "int8":
            x, weight = quantized(x, isa), int8_weight(weight)
        return x.double() @ weight.double().T + (0 if bias is None else bias.double())

    return product


def scale_of(x, weight, bias=None):
    """[rows, 1] size of a sum of products, should they happen to cancel, times the root of their number."""
    size = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1).amax()
    return (size + (0 if bias is None else bias.double().abs().amax())).clamp_min(1e-30)


@pytest.fixture
def check(reference):
    def run(linear, x, weight, keep, bias=None, wide=False):
        got = linear(x, wide=wide)
        wanted = reference(x, weight, keep, bias)
        assert got.dtype == (torch.float32 if wide else x.dtype)
        assert got.shape == wanted.shape
        allowed = ROUNDING * scale_of(x, weight, bias)
        if got.dtype == torch.bfloat16:
            allowed = allowed + BF16_STEP * wanted.abs()
        assert (((got.double() - wanted).abs() - allowed) <= 0).all()

    return run


def sizes(rng):
    """Shapes around the kernels' edges: strips of 16, panels of 32 and 48, pairs, blocks of 32, tiles of 8."""
    out_size = rng.choice([1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 97, 150])
    in_size = rng.choice([1, 2, 3, 31, 32, 33, 64, 255, 576])
    return out_size, in_size


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("seed", range(6))
def test_values(isa, check, keep, seed):
    """Random shapes, types of weight and activations, row strides, with and without a bias."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    run = tape(isa, threads=rng.choice([1, 2, 3]))
    for _ in range(8):
        out_size, in_size = sizes(rng)
        shipped = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        whole = torch.randn(out_size + 2, in_size + 3, generator=generator).to(shipped)
        weight = whole[1 : 1 + out_size, 2 : 2 + in_size]
        bias = torch.randn(out_size, generator=generator) if rng.random() < 0.5 else None
        linear = NativeLinear(run, [weight], keep, bias)
        for rows in (0, 1, rng.choice([2, 3, 5, 7]), rng.choice([8, 9, 16, 17, 65]), rng.choice([130, 300])):
            dtype = rng.choice([torch.float32, torch.bfloat16])
            x = torch.randn(rows, in_size + 5, generator=generator).to(dtype)[:, 1 : 1 + in_size]
            check(linear, x, weight, keep, bias, wide=rng.random() < 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (2048, 640), (5000, 576)])
def test_values_of_whole_layers(isa, check, keep, shape):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(*shape, generator=generator).bfloat16()
    linear = NativeLinear(tape(isa, threads=2), [weight], keep)
    for rows in (1, 4, 64, 400):
        x = torch.randn(rows, shape[1], generator=generator).bfloat16()
        check(linear, x, weight, keep, wide=True)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_row_has_the_same_bits_in_any_company(isa, keep):
    """Alone, among 1 to 70 others, in any chunk, with any number of threads."""
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(113, 577, generator=generator), torch.randn(113, generator=generator)
    x = torch.randn(71, 577, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        whole = NativeLinear(tape(isa, threads=1), [weight], keep, bias)(x.to(dtype))
        for threads in (1, 2, 3):
            linear = NativeLinear(tape(isa, threads), [weight], keep, bias)
            for rows in (*range(1, 20), 40, 71):
                first = (rows * 7) % (72 - rows)
                assert torch.equal(linear(x[first : first + rows].to(dtype)), whole[first : first + rows]), (
                    rows,
                    threads,
                )


@pytest.mark.parametrize("keep", KEEPS)
def test_an_output_has_the_same_bits_on_any_rank(isa, keep):
    """A rank holds some of the outputs: strips and panels of a weight begin elsewhere then."""
    generator = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(576, 257, generator=generator), torch.randn(576, generator=generator)
    run = tape(isa, threads=2)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(11, 257, generator=generator).to(dtype)
        whole = NativeLinear(run, [weight], keep, bias)(x)
        for first, last in ((0, 288), (288, 576), (192, 384), (7, 100), (33, 34), (500, 576)):
            part = NativeLinear(run, [weight[first:last]], keep, bias[first:last])
            for rows in (1, 3, 11):
                assert torch.equal(part(x[:rows]), whole[:rows, first:last]), (first, last, rows)


@pytest.mark.parametrize("keep", KEEPS)
def test_many_rows_are_taken_in_chunks_with_the_same_bits(isa, keep):
    """More rows than the second-level cache holds activations of, and than the converted ones have room for."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(33, 4096, generator=generator)
    linear = NativeLinear(tape(isa, threads=2), [weight], keep)
    x = torch.randn(128, 4096, generator=generator).repeat(40, 1)
    got = linear(x)
    assert torch.equal(got, linear(x[:128]).repeat(40, 1))


@pytest.mark.parametrize("keep", KEEPS)
def test_extreme_values(isa, reference, keep):
    """Zeros stay zeros, tiny and large values keep their relative error, and what is not finite spoils its row only."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(40, 64, generator=generator)
    linear = NativeLinear(tape(isa), [weight], keep)
    x = torch.randn(7, 64, generator=generator)
    x[1], x[2], x[3] = 0, x[2] * 1e-30, x[3] * 1e30
    x[4, 5], x[5, 6] = torch.inf, torch.nan
    x[6] = 1e-42  # denormal: counts as zero
    got = linear(x)
    finite = [0, 1, 2, 3]
    allowed = ROUNDING * scale_of(x[finite], weight)
    assert ((got[finite].double() - reference(x[finite], weight, keep)).abs() <= allowed + 1e-33).all()
    assert (got[1] == 0).all()
    assert not got[4].isfinite().any()
    assert got[5].isnan().all()
    assert (got[6].abs() < 1e-37).all()


@pytest.mark.parametrize("keep", KEEPS)
def test_extreme_weights(isa, reference, keep):
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(5))
    weight[1], weight[2], weight[3], weight[4] = 0, 1e-42, 1e30, weight[4] * 1e-30
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(6))
    got = NativeLinear(tape(isa), [weight], keep)(x)
    for row in (0, 1, 3, 4):  # errors are relative to the weights of one output
        check_row = (got[:, row].double() - reference(x, weight[row : row + 1], keep)[:, 0]).abs()
        assert (check_row <= ROUNDING * scale_of(x, weight[row : row + 1])[:, 0] + 1e-33).all()
    assert (got[:, 2].abs() < 1e-37).all()


def test_rows_come_from_the_step(isa):
    """An op recorded for a step's tokens or outputs runs over as many rows as the step has."""
    library = Library(2, isa)
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(7)).bfloat16()
    linear = NativeLinear(Tape(library), [weight], "bf16")
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(8)).bfloat16()
    expected = linear(x)
    for code, field in ((TOKENS, "num_tokens"), (OUTPUTS, "num_outputs")):
        out = torch.full((9, 50), 7, dtype=torch.bfloat16)
        op = make_op(LINEAR, torch.bfloat16, code, (64, 50, 0), (), (x.data_ptr(), out.data_ptr(), linear.handle))
        assert op.dtype == BF16
        library.run((Op * 1)(op), 1, Step(**{field: 4}))
        assert torch.equal(out[:4], expected[:4])
        assert (out[4:] == 7).all()


def test_packed_bytes(isa):
    weight = torch.randn(96, 64)
    plain = 96 * 64
    made = {keep: NativeLinear(tape(isa), [weight], keep).nbytes for keep in KEEPS}
    assert made == {"bf16": 2 * plain, "float32": 4 * plain, "int8": plain + 96 * 4}


def test_error_of_eight_bits(isa):
    """Within half a step of each factor, summed in the worst case."""
    generator = torch.Generator().manual_seed(12)
    weight, x = torch.randn(64, 256, generator=generator), torch.randn(20, 256, generator=generator)
    got = NativeLinear(tape(isa), [weight], "int8")(x)
    step_x = (x.view(20, -1, 32).abs().amax(-1, keepdim=True) / 127).expand(-1, -1, 32).reshape(20, 256)
    step_w = weight.abs().amax(1, keepdim=True) / 127
    bound = (step_x / 2) @ weight.abs().T + (x.abs() + step_x / 2) @ (step_w / 2).expand(-1, 256).T
    error = (got.double() - x.double() @ weight.double().T).abs()
    assert (error <= bound * 1.0001).all()
    assert error.mean() < 0.1 * bound.mean()  # roundings of both signs cancel


def test_memory_is_given_back():
    """Weights come and go; what is left of them does not grow."""
    run = tape(ISAS[0])

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    weight = torch.randn(1024, 2048)
    NativeLinear(run, [weight], "float32")(weight[:1])
    gc.collect()
    before = resident()
    for _ in range(20):
        NativeLinear(run, [weight], "float32")
        gc.collect()
    assert resident() - before < 40 << 20  # of 160 MB


def test_what_cannot_be_packed_is_refused():
    run = tape(ISAS[0])
    with pytest.raises(ValueError, match=r"weight \[2, 0\] cannot be packed: 0 inputs"):
        NativeLinear(run, [torch.zeros(2, 0)], "bf16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", WAYS)
def test_ways_of_keeping_weights(dtype, weights):
    """Every way that `supports` accepts runs, within the error of the narrowest type it names."""
    spec = KernelSpec(dtype, "cpu", weights)
    assert NativeKernels.supports("make_linear", spec) is None
    generator = torch.Generator().manual_seed(9)
    for shipped in (torch.float32, torch.bfloat16):
        weight = torch.randn(70, 96, generator=generator).to(shipped)
        x = torch.randn(5, 96, generator=generator).to(getattr(torch, dtype))
        kernels = NativeKernels(NativeKernels.Options(), spec)
        exact = weights in ("float32", "as-shipped") or (weights == "auto" and dtype == "float32")
        error = (kernels.make_linear(weight)(x).double() - x.double() @ weight.double().T).abs()
        allowed = (4e-7 if exact and dtype == "float32" and shipped == torch.float32 else 3e-3) * scale_of(x, weight)
        assert (error <= allowed).all()
        logits = kernels.make_head(weight)(x)
        assert logits.dtype == torch.float32


def test_head_keeps_the_logits_unrounded():
    spec = KernelSpec("bfloat16", "cpu")
    kernels = NativeKernels(NativeKernels.Options(), spec)
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(10)).bfloat16()
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(11)).bfloat16()
    logits = kernels.make_head(weight)(x)
    assert ((logits.double() - x.double() @ weight.double().T).abs() <= ROUNDING * scale_of(x, weight)).all()


def test_refuses_other_ways():
    reason = NativeKernels.supports("make_linear", KernelSpec("bfloat16", "cpu", "int3"))
    assert reason is not None and "'int3'" in reason

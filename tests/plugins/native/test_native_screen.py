"""The argmax by an 8-bit copy of the head is the argmax of the head, whatever the values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interlace.interfaces.kernels import KernelSpec
from interlace.plugins.kernels.native import NativeKernels
from interlace.plugins.native.library import LINEAR, SCREENED_ARGMAX, Op, Step, make_op
from interlace.plugins.native.linear import HeadScreen, NativeLinear

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KEEP = {"bfloat16": "bf16", "float32": "float32"}


class Head:
    """A head and its screen."""

    def __init__(self, weight, isa="auto"):
        dtype = "bfloat16" if weight.dtype == torch.bfloat16 else "float32"
        self.kernels = NativeKernels(NativeKernels.Options(isa=isa), KernelSpec(dtype, "cpu", "auto"))
        self.weight = NativeLinear(self.kernels._tape, [weight], KEEP[dtype])
        self.library = self.kernels._tape.library
        self.screen = HeadScreen.make(self.library, self.op(torch.zeros(1, weight.shape[1], dtype=weight.dtype)))
        assert self.screen is not None

    def op(self, x, out=None, handle=None):
        pointers = (x.data_ptr(), out.data_ptr() if out is not None else 0, handle or self.weight.handle)
        return make_op(LINEAR, x.dtype, len(x), (x.stride(0), self.weight.out_size, 1), (), pointers)

    def exact(self, x):
        """(index, value) of all logits, one after the other as the contract says."""
        return self.kernels.argmax(self.weight(x, wide=True))

    def screened(self, x):
        size = self.weight.out_size
        rough = torch.empty(len(x), size)
        best, values = torch.empty(len(x), dtype=torch.int64), torch.empty(len(x))
        pointers = tuple(tensor.data_ptr() for tensor in (rough, best, values, x))
        checked = make_op(
            SCREENED_ARGMAX, x.dtype, len(x), (size, size, x.stride(0)), (), (*pointers, self.screen.handle)
        )
        self.library.run((Op * 2)(self.op(x, rough, self.screen.copy), checked), 2, Step())
        return best.numpy(), values.numpy()

    def check(self, x):
        for found, wanted in zip(self.screened(x), self.exact(x), strict=True):
            np.testing.assert_array_equal(found, wanted)


def bits_of(values):
    return np.asarray(values).view(np.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocabulary", "size"), [(1, 32), (15, 32), (16, 64), (48, 96), (97, 32), (1000, 128), (8192, 64), (20011, 96)]
)
def test_index_and_bits_are_those_of_all_logits(isa, dtype, vocabulary, size):
    torch.manual_seed(vocabulary)
    head = Head(torch.randn(vocabulary, size).to(DTYPES[dtype]), isa)
    for rows in (1, 2, 7, 13):
        x = (torch.randn(rows, size) * 10 ** torch.linspace(-3, 3, rows)[:, None]).to(DTYPES[dtype])
        head.check(x)
        assert (bits_of(head.screened(x)[1]) == bits_of(head.exact(x)[1])).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart(dtype):
    torch.manual_seed(2)
    head = Head(torch.randn(300, 64).to(DTYPES[dtype]))
    head.check(torch.randn(9, 200).to(DTYPES[dtype])[:, 64:128])


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_logits_the_first_wins(isa, dtype):
    torch.manual_seed(3)
    weight = torch.randn(9000, 32).to(DTYPES[dtype])
    x = torch.randn(4, 32).to(DTYPES[dtype])
    weight[[170, 8999, 8500, 16]] = (x[0] * 40).to(weight.dtype)  # over two pieces of work, and several strips
    head = Head(weight, isa)
    head.check(x)
    assert head.screened(x)[0][0] == 16
    same = Head(torch.ones(777, 32, dtype=DTYPES[dtype]), isa)
    same.check(x)
    assert same.screened(x)[0].tolist() == [0] * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_differ_in_the_last_bits_are_told_apart(isa, dtype):
    """Rows far closer to each other than 8 bits can see."""
    torch.manual_seed(4)
    base = torch.randn(64)
    step = 2**-8 if dtype == "bfloat16" else 2**-22
    weight = (base * (1 + step * torch.randint(0, 3, (5000, 64)))).to(DTYPES[dtype])
    head = Head(weight, isa)
    head.check(torch.stack([base, -base, base.roll(1), torch.randn(64)]).to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e-6, 1e6, 1e15, 1e30])
@pytest.mark.parametrize("what", ["weight", "x", "both"])
def test_extreme_sizes(isa, dtype, scale, what):
    torch.manual_seed(5)
    weight, x = torch.randn(500, 64), torch.randn(3, 64)
    weight = weight * scale if what != "x" else weight
    x = x * scale if what != "weight" else x
    Head(weight.to(DTYPES[dtype]), isa).check(x.to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_counts_as_in_all_logits(isa, dtype, value):
    torch.manual_seed(6)
    weight, x = torch.randn(300, 64).to(DTYPES[dtype]), torch.randn(5, 64).to(DTYPES[dtype])
    spoiled = x.clone()
    spoiled[1, 3] = spoiled[4, 63] = value
    Head(weight, isa).check(spoiled)
    for row in (0, 131, 299):
        broken = weight.clone()
        broken[row, 7] = value
        Head(broken, isa).check(x)
        Head(broken, isa).check(spoiled)


def test_uneven_values_within_a_row():
    """One input far larger than its neighbours takes all 127 steps, so that the others are lost in the copy."""
    torch.manual_seed(7)
    weight, x = torch.randn(4000, 96), torch.randn(6, 96)
    weight[:, 5] *= 1000
    x[:, 40] *= 3000
    for dtype in DTYPES.values():
        Head(weight.to(dtype)).check(x.to(dtype))


@pytest.mark.parametrize(
    ("keep", "parts", "x_dtype"),
    [
        ("int8", [(64, 64)], torch.bfloat16),
        ("bf16", [(64, 64)], torch.float32),  # the product rounds x, which the bound does not know
        ("float32", [(64, 64)], torch.bfloat16),
        ("bf16", [(50, 64), (14, 64)], torch.bfloat16),  # a panel that is not full in the middle
        ("bf16", [(64, 48)], torch.bfloat16),
    ],
)
def test_other_heads_have_no_screen(keep, parts, x_dtype):
    kernels = NativeKernels(NativeKernels.Options(), KernelSpec("float32", "cpu", "auto"))
    linear = NativeLinear(kernels._tape, [torch.randn(shape) for shape in parts], keep)
    op = make_op(LINEAR, x_dtype, 1, (parts[0][1], 64, 1), (), (0, 0, linear.handle))
    assert HeadScreen.make(kernels._tape.library, op) is None
    biased = NativeLinear(kernels._tape, [torch.randn(64, 64)], "bf16", torch.randn(64))
    op = make_op(LINEAR, torch.bfloat16, 1, (64, 64, 1), (), (0, 0, biased.handle))
    assert HeadScreen.make(kernels._tape.library, op) is None

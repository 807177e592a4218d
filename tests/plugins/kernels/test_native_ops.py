"""The small native ops, on every instruction set: layouts, extreme values, and threads that must not change a bit."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from interlace.interfaces.kernels import Kernels, KernelSpec
from interlace.interfaces.weights import BlockWeight
from interlace.plugins.checkpoints.gguf_blocks import FORMATS, decode
from interlace.plugins.kernels import interlace_kernels
from interlace.plugins.kernels.native import NativeKernels
from interlace.plugins.native.library import COPY_ROWS, DTYPES, OUTPUTS, ROPE, TOKENS, Op, Step, make_op
from interlace.sampling.argmax import argmax

TYPES = ("float32", "bfloat16")
SIZES = (1, 7, 16, 61, 576, 640)


def native(isa, dtype="float32"):
    return NativeKernels(NativeKernels.Options(isa=isa), KernelSpec(dtype, "cpu"))


def reference():
    return Kernels(Kernels.Options(), KernelSpec("float32", "cpu"))


def random_rows(rows, size, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, size + 9, generator=generator) * scale
    return wide.to(getattr(torch, dtype))[:, 4 : 4 + size]  # a slice: rows start anywhere


def close(found, wanted, dtype):
    step = 2**-8 if dtype == "bfloat16" else 2e-6
    torch.testing.assert_close(found.double(), wanted.double(), rtol=step, atol=step * 1e-3, equal_nan=True)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gates_over_all_of_the_range(isa, dtype, size):
    """From where the activation is its input to where it vanishes."""
    x = random_rows(5, 2 * size, dtype, scale=20.0)
    gate, up = x.double().chunk(2, dim=-1)
    kernels = native(isa, dtype)
    scale = (gate * up).abs().amax()
    for found, wanted in (
        (kernels.silu_mul(x), torch.nn.functional.silu(gate) * up),
        (kernels.gelu_mul(x), torch.nn.functional.gelu(gate, approximate="tanh") * up),
    ):
        assert (found.double() - wanted).abs().amax() <= (2**-8 if dtype == "bfloat16" else 1e-6) * scale


def test_gates_at_the_ends(isa):
    gate = torch.tensor([[200.0, -200.0, 1e30, -1e30, 0.0, 1e-40, math.inf, math.nan]])
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
    for found in (native(isa).silu_mul(gate_up), native(isa).gelu_mul(gate_up)):
        torch.testing.assert_close(found[0, :6], torch.tensor([200.0, 0.0, 1e30, 0.0, 0.0, 0.0]), rtol=1e-6, atol=1e-6)
        assert found[0, 6] == math.inf and found[0, 7].isnan()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e17])
def test_norms_of_any_magnitude(isa, dtype, scale):
    x, residual, weight = (random_rows(4, 61, dtype, seed, scale if seed < 2 else 1.0) for seed in range(3))
    kernels, plain = native(isa, dtype), reference()
    for unit_offset in (False, True):
        wide = x.double(), weight[0].double()
        wanted = wide[0] / (wide[0].pow(2).mean(-1, keepdim=True) + 1e-34).sqrt() * (wide[1] + unit_offset)
        found = kernels.rms_norm(x, weight[0], 1e-34, unit_offset)
        assert (found.double() - wanted).abs().amax() <= (2**-6 if dtype == "bfloat16" else 2e-6) * wanted.abs().amax()
        total = residual.clone()
        normed, total = kernels.add_rms_norm(x, total, weight[0], 1e-6, unit_offset)
        assert torch.equal(total, residual + x)
        close(normed, plain.rms_norm(residual + x, weight[0], 1e-6, unit_offset), dtype)


def test_norm_of_strided_heads(isa):
    """Queries and keys within the fused projection, as models with q/k norm give them."""
    fused = random_rows(6, 8 * 16, "bfloat16")
    query = fused.view(6, 8, 16)[:, 1:5]
    weight = random_rows(1, 16, "bfloat16")[0]
    found = native(isa, "bfloat16").rms_norm(query, weight, 1e-6, False)
    assert found.shape == query.shape
    close(found, reference().rms_norm(query.contiguous(), weight, 1e-6, False), "bfloat16")


def test_norm_of_what_is_not_finite(isa):
    x = torch.ones(3, 20)
    x[0, 3], x[1, 3] = math.nan, math.inf
    found = native(isa).rms_norm(x, torch.ones(20), 1e-6, False)
    assert found[0].isnan().all() and found[1, 3].isnan() and torch.equal(found[2], torch.ones(20) / (1 + 1e-6) ** 0.5)


def angles(positions=64, half=8):
    turns = torch.arange(positions)[:, None] * 0.7 ** torch.arange(half)
    return torch.cat((turns.cos(), turns.sin()), dim=1)


@pytest.mark.parametrize("dtype", TYPES)
def test_rope_in_place_and_for_the_steps_positions(isa, dtype):
    """As a recorded program has it: the op writes over its input and takes positions and rows from the step."""
    kernels, table = native(isa, dtype), angles()
    fused = random_rows(5, 6 * 24, dtype).reshape(5, 6, 24)
    query, key = fused[:, :4], fused[:, 4:]
    positions = torch.tensor([3, 63, 0, 17, 17])
    wanted = kernels.rope(query, key, positions, table)
    strides = (*query.stride()[:2], *key.stride()[:2], query.stride(0), key.stride(0))
    addresses = [x.data_ptr() for x in (query, key, query, key)]
    integers = (24, 16, 4, 2, *strides, 64)
    ops = (Op * 1)(make_op(ROPE, query.dtype, TOKENS, integers, (), [*addresses, None, table.data_ptr()]))
    kernels._tape.library.run(ops, 1, Step(num_tokens=4, positions=positions.data_ptr()))
    for found, turned in zip((query, key), wanted, strict=True):
        assert torch.equal(found[:4], turned[:4]) and not torch.equal(found[4], turned[4])


def test_scale_and_embedding(isa):
    for dtype in TYPES:
        kernels, weight = native(isa, dtype), random_rows(50, 61, dtype)
        ids = torch.tensor([0, 49, 7, 7])
        assert torch.equal(kernels.embedding(ids, weight), weight[ids])
        assert torch.equal(kernels.scale(weight, 24.25), weight * 24.25)


def test_unknown_tokens_read_no_foreign_memory(isa):
    found = native(isa).embedding(torch.tensor([1, -1, 50, 1 << 40]), random_rows(50, 8, "float32"))
    assert found[0].isfinite().all() and found[1:].isnan().all()


@pytest.mark.parametrize("form", FORMATS)
def test_embedding_in_blocks(isa, form):
    """Bit for bit the values of the format."""
    values, size, _ = FORMATS[form]
    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, (9, 3, size), dtype=np.uint8)
    for first in (208,) if form == "Q6_K" else (0, 2):  # the scales: halves of moderate size
        if first == 0 or form not in ("Q4_0", "Q5_0", "Q8_0"):
            data[..., first : first + 2] = rng.normal(0, 0.1, (9, 3, 1)).astype(np.float16).view(np.uint8)
    data[0, 0, (208 if form == "Q6_K" else 0) + 1] = 0  # a denormal scale
    blocks = torch.from_numpy(data).flatten(1)
    weight = BlockWeight(form, (9, 3 * values), blocks, lambda rows: decode(form, rows))
    ids = torch.tensor([8, 0, 3, 9, -1])
    for dtype in TYPES:
        found = native(isa, dtype).make_block_embedding(weight)(ids)
        assert torch.equal(found[:3], decode(form, blocks[ids[:3]]).to(getattr(torch, dtype)))
        assert found[3:].isnan().all()


@pytest.mark.parametrize("vocab", [1, 5, 63, 64, 1000, 8193, 49152])
def test_argmax(isa, vocab, use_threads):
    """Ties go to the first; NaN counts as the largest."""
    use_threads(2)
    logits = random_rows(6, vocab, "float32")
    logits[1] = 0.5
    logits[2, vocab // 2 :: 7] = 9.0
    logits[3, vocab - 1] = math.nan
    logits[4, vocab // 3], logits[4, vocab // 2] = math.nan, math.inf
    logits[5] = -math.inf
    for rows in (logits, logits[:0], logits[2:3]):
        found, wanted = native(isa).argmax(rows), argmax(rows)
        assert np.array_equal(found[0], wanted[0]) and np.array_equal(found[1], wanted[1], equal_nan=True)


@pytest.mark.parametrize("dtype", TYPES)
def test_output_rows_are_gathered(isa, dtype):
    x = random_rows(9, 61, dtype)
    out = torch.zeros(4, 61, dtype=x.dtype)
    places = torch.tensor([8, 0, 3])
    ops = (Op * 1)(
        make_op(COPY_ROWS, x.dtype, OUTPUTS, (61, x.stride(0), out.stride(0)), (), (x.data_ptr(), out.data_ptr()))
    )
    native(isa, dtype)._tape.library.run(ops, 1, Step(num_tokens=9, num_outputs=3, outputs=places.data_ptr()))
    assert torch.equal(out[:3], x[places]) and not out[3].any()


@pytest.mark.parametrize("dtype", TYPES)
def test_threads_change_no_bit(isa, dtype, use_threads):
    rng = random.Random(2)
    x, residual = random_rows(70, 1152, dtype, 1), random_rows(70, 1152, dtype, 2)
    weight = random_rows(1, 1152, dtype, 3)[0]

    def run(rows):
        kernels = native(isa, dtype)
        given = x[rows]
        return (
            kernels.rms_norm(given, weight, 1e-6, True),
            *kernels.add_rms_norm(given, residual[rows].clone(), weight, 1e-6, False),
            kernels.silu_mul(given),
            kernels.gelu_mul(given),
            *kernels.rope(given.reshape(-1, 72, 16), given.reshape(-1, 72, 16), torch.tensor(rows) % 64, angles()),
        )

    use_threads(1)
    whole = run(list(range(70)))
    for threads in (2, 3):
        use_threads(threads)
        rows = rng.sample(range(70), rng.choice([1, 40, 70]))
        for found, wanted in zip(run(rows), whole, strict=True):
            assert torch.equal(found, wanted[rows])


def test_provider_is_listed():
    assert "native" in [provider.name for provider in interlace_kernels()]
    assert set(DTYPES) == {torch.float32, torch.bfloat16}

"""What the conformance suite leaves out: threads, splits and layouts that must not change a bit, and extreme values."""

from __future__ import annotations

import random

import pytest
import torch

from interlace.interfaces.attention import AttentionSpec
from interlace.plugins.attention import interlace_attention
from interlace.plugins.attention.native import NativeAttention
from interlace.testing.attention_suite import PagedAttention
from interlace.testing.paging import Pager
from interlace.testing.reference import dense_attention

SPECS = {
    "smollm2": AttentionSpec(9, 3, 64),
    "gemma3": AttentionSpec(4, 1, 256, kind="window", window=100),
    "one KV head for many": AttentionSpec(32, 1, 40, softcap=5.0),
}
MAX_LEN = 800


def paged(spec, block_size=32, dtype="bfloat16", **options):
    return PagedAttention(
        NativeAttention,
        spec,
        block_size,
        dtype,
        max_len=MAX_LEN,
        num_sequences=3,
        options=NativeAttention.Options(**options),
        seed=3,
    )


def results(attention, steps):
    """Of sequence `a`, [tokens, heads, head_size], and the largest error of all."""
    error = max(attention.step(step) for step in steps)
    return torch.cat(attention.outputs["a"]), error


def chunks(length, rng):
    """Steps that run `length` tokens of `a` in pieces, now and then beside `b`."""
    while length:
        count = min(length, rng.choice([1, 1, 90, 200]))
        length -= count
        yield {"a": count, **({"b": rng.choice([1, 5])} if rng.random() < 0.5 else {})}


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_threads_chunks_and_blocks_change_no_bit(isa, spec, kv_dtype, use_threads):
    use_threads(1)
    whole, error = results(paged(spec, isa=isa, kv_dtype=kv_dtype), [{"a": 280}, *[{"a": 1}] * 3])
    assert error < (0.02 if kv_dtype == "auto" else 0.06)
    rng = random.Random(5)
    for threads, block_size in ((2, 48), (3, 128)):
        use_threads(threads)
        attention = paged(spec, block_size, isa=isa, kv_dtype=kv_dtype)
        assert attention.backend.library.threads == threads
        cut, _ = results(attention, list(chunks(283, rng)))
        assert torch.equal(whole, cut), f"{threads} threads, blocks of {block_size}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_chunks_change_no_bit_thoroughly(isa, spec, dtype, seed, use_threads):
    rng = random.Random(seed)
    use_threads(1)
    whole, _ = results(paged(spec, dtype=dtype, isa=isa), [{"a": 700}, *[{"a": 1}] * 6])
    for threads in (2, 3):
        use_threads(threads)
        cut, _ = results(paged(spec, rng.choice([16, 32, 64]), dtype, isa=isa), list(chunks(706, rng)))
        assert torch.equal(whole, cut), f"{threads} threads"


def attend(isa, query, key, value, spec=None, dtype="float32"):
    """Plain attention of one sequence whose keys and values are given: in one step, then in two."""
    spec = spec or AttentionSpec(query.shape[1], key.shape[1], query.shape[2])
    backend = NativeAttention(NativeAttention.Options(isa=isa), spec, 16, dtype, "cpu")
    given = [x.to(getattr(torch, dtype)) for x in (query, key, value)]
    found = []
    for cuts in ([len(query)], [len(query) - 1, 1]):
        pager = Pager([0], 16, 40, 400)
        layout = backend.cache_layout(40)
        cache = torch.full(layout.shape, torch.nan, dtype=getattr(torch, layout.dtype))
        at, parts = 0, []
        for count in cuts:
            metadata = backend.prepare(pager.next_batch({"a": [0] * count}), 0)
            parts.append(backend.forward(*(x[at : at + count] for x in given), cache, metadata))
            at += count
        found.append(torch.cat(parts))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    return found[0]


def random_streams(length=40, heads=4, kv_heads=2, size=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, count, size, generator=generator) for count in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_scores_are_no_overflow(isa, dtype):
    """The largest score decides alone; nothing becomes infinite on the way."""
    query, key, value = (x.bfloat16().float() for x in random_streams())
    found = attend(isa, query * 1e6, key * 1e6, value, dtype=dtype).double()
    wanted = dense_attention(AttentionSpec(4, 2, 16), query * 1e6, key * 1e6, value)
    assert (found - wanted).abs().max() < 0.05


def test_weights_that_vanish(isa):
    """Far scores get weight zero, tile after tile, and the near ones stay exact."""
    query, key, value = random_streams(length=390)
    key[:, :, 0] = torch.linspace(-3000, 3000, 390)[:, None]
    query[:, :, 0] = 4.0
    found = attend(isa, query, key, value).double()
    assert (found - dense_attention(AttentionSpec(4, 2, 16), query, key, value)).abs().max() < 1e-3


def test_tiny_values_and_zeros(isa):
    """Denormals count as nothing: all weights are equal then."""
    query, key, value = random_streams()
    found = attend(isa, query * 1e-40, key * 1e-40, value)
    steps = torch.arange(1, 41)[:, None, None]
    mean = (value.cumsum(0) / steps).repeat_interleave(2, dim=1)
    torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(attend(isa, query, key, value * 0), torch.zeros_like(query))


def test_first_token_is_its_value(isa):
    for dtype in ("float32", "bfloat16"):
        query, key, value = (x.to(getattr(torch, dtype)) for x in random_streams(length=2))
        assert torch.equal(attend(isa, query, key, value, dtype=dtype)[0], value[0].repeat_interleave(2, dim=0))


def test_a_value_that_is_no_number_is_not_hidden(isa):
    """A row whose own numbers are broken must not pass for a result."""
    query, key, value = random_streams()
    query[7, 1] = torch.nan
    found = attend(isa, query, key, value)
    assert found[7, 1].isnan().all()
    found[7, 1] = 0
    assert found.isfinite().all()


def test_strided_input(isa):
    """Heads that do not lie one after the other are copied; rows of a fused projection are not."""
    query, key, value = random_streams()
    wanted = attend(isa, query, key, value)
    apart = [torch.stack((x, x), dim=2)[:, :, 0] for x in (query, key, value)]
    assert torch.equal(attend(isa, *apart), wanted)
    fused = torch.cat((query, key, value), dim=1).split([4, 2, 2], dim=1)
    assert torch.equal(attend(isa, *fused), wanted)


def test_refusals_say_why():
    full = AttentionSpec(4, 2, 64)
    assert NativeAttention.supports(full, 32, "bfloat16", "cpu") is None
    assert "multiples of 16, not 24" in (NativeAttention.supports(full, 24, "bfloat16", "cpu") or "")
    assert "not in float16" in (NativeAttention.supports(full, 32, "float16", "cpu") or "")
    assert "not on cuda" in (NativeAttention.supports(full, 32, "float32", "cuda") or "")
    assert "above 0, not by -0.5" in (
        NativeAttention.supports(AttentionSpec(4, 2, 64, scale=-0.5), 32, "float32", "cpu") or ""
    )
    assert "not 320" in (NativeAttention.supports(AttentionSpec(4, 2, 320), 32, "float32", "cpu") or "")


def test_an_8_bit_cache_is_about_half_as_large():
    def bytes_of(kv_dtype):
        options = NativeAttention.Options(kv_dtype=kv_dtype)
        return NativeAttention(options, SPECS["smollm2"], 32, "bfloat16", "cpu").cache_layout(10).nbytes

    assert bytes_of("auto") == 10 * 32 * 3 * 64 * 2 * 2
    assert bytes_of("int8") == 10 * 32 * 3 * (64 + 4) * 2


def test_provider_is_listed():
    assert "native" in [provider.name for provider in interlace_attention()]

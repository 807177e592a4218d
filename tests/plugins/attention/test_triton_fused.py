"""Triton attention that norms and turns heads and writes the cache in one launch gives what the separate steps give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interlace.interfaces.attention import AttentionSpec, HeadNorms, HeadTurn
from interlace.interfaces.kernels import Kernels, KernelSpec
from interlace.plugins.attention.triton import TritonAttention
from interlace.worker.batch import ForwardBatch

BLOCK_SIZE, NUM_BLOCKS, LENGTHS = 16, 9, [1, 19, 1, 5]
TOKENS = sum(LENGTHS)


def _batch():
    """Rows without a past, each in blocks of its own; the blocks in any order."""
    tables = torch.tensor([[5, 0], [2, 8], [7, 0], [4, 0]], dtype=torch.int32)
    positions = torch.tensor([p for length in LENGTHS for p in range(length)])
    rows = np.repeat(np.arange(4), LENGTHS)
    slots = tables[rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    return ForwardBatch(torch.zeros(TOKENS, dtype=torch.int64), positions, LENGTHS, [0] * 4, [tables], [slots])


def _backend(shape, dtype, **options):
    heads, kv_heads, size = shape
    spec = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_size=size)
    return TritonAttention(TritonAttention.Options(**options), spec, BLOCK_SIZE, dtype, "cpu")


def _cache(backend):
    """Poisoned: what is read without having been written shows."""
    layout = backend.cache_layout(NUM_BLOCKS)
    cache = torch.zeros(layout.shape, dtype=getattr(torch, layout.dtype))
    cache.view(torch.uint8).fill_(0xFF)
    return cache


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "fp8"}], ids=["plain", "fp8"])
@pytest.mark.parametrize("norm", ["no norms", "norms", "norms with offset"])
@pytest.mark.parametrize(
    ("shape", "rotary", "dtype"),
    [
        pytest.param((4, 2, 32), 32, "float32", marks=pytest.mark.slow),
        pytest.param((9, 3, 24), 16, "float16", marks=pytest.mark.slow),
        ((3, 1, 16), 16, "float32"),
    ],
    ids=str,
)
def test_fused_equals_separate(shape, rotary, dtype, norm, options):
    heads, kv_heads, size = shape
    generator = torch.Generator().manual_seed(heads)
    kind = getattr(torch, dtype)
    fused = torch.randn(TOKENS, heads + 2 * kv_heads, size, generator=generator).to(kind)
    query, key, value = fused.split([heads, kv_heads, kv_heads], dim=1)  # as a projection yields them
    angles = torch.rand(40, rotary // 2, generator=generator) * 6
    norms = None
    if norm != "no norms":
        weights = torch.rand(2, size, generator=generator).to(kind)
        norms = HeadNorms(weights[0], weights[1], 1e-5, norm == "norms with offset")
    turn = HeadTurn(torch.cat((angles.cos(), angles.sin()), dim=1), norms)
    backend, batch, kernels = (
        _backend(shape, dtype, **options),
        _batch(),
        Kernels(Kernels.Options(), KernelSpec(dtype, "cpu")),
    )
    assert backend.turns_heads
    metadata = backend.prepare(batch, 0)
    given, cache, own_cache = fused.clone(), _cache(backend), _cache(backend)
    found = backend.forward_turned(query, key, value, batch.positions, cache, metadata, turn)
    assert torch.equal(fused, given)

    if norms is not None:
        query = kernels.rms_norm(query, norms.query, norms.eps, norms.unit_offset)
        key = kernels.rms_norm(key, norms.key, norms.eps, norms.unit_offset)
    query, key = kernels.rope(query, key, batch.positions, turn.cos_sin)
    wanted = backend.forward(query, key, value, own_cache, metadata)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    if options:
        tolerance = 0.1  # a rounding that falls the other way is a sixteenth
        touched, own = (c.view(torch.uint8) != 0xFF for c in (cache, own_cache))
        assert (touched != own).float().mean() < 0.01  # a few bytes are 0xFF by chance
    else:
        assert torch.equal(cache.isnan(), own_cache.isnan())
        assert torch.allclose(cache.nan_to_num().float(), own_cache.nan_to_num().float(), atol=tolerance)
    assert torch.allclose(found.float(), wanted.float(), atol=tolerance)


def test_padding_is_not_written():
    """A negative slot is of a token that only fills up a batch."""
    backend, batch = _backend((2, 1, 16), "float32"), _batch()
    turn = HeadTurn(torch.ones(40, 16))
    metadata = backend.prepare(batch, 0)
    cache = _cache(backend)
    query, key = torch.ones(TOKENS, 2, 16), torch.ones(TOKENS, 1, 16)
    slots = metadata.slots.clone()
    slots[3:] = -1
    backend.forward_turned(query, key, key, batch.positions, cache, metadata._replace(slots=slots), turn)
    assert int((~cache.isnan()).sum()) == 3 * 2 * 16


def test_fusion_can_be_switched_off():
    assert not _backend((2, 1, 16), "float32", fuse=False).turns_heads

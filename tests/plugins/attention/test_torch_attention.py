"""Attention `torch` against dense attention in float64, over random paged layouts in a poisoned cache."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch

from interlace.interfaces.attention import AttentionSpec
from interlace.plugins.attention import interlace_attention
from interlace.plugins.attention import torch as implementation
from interlace.plugins.attention.torch import TorchAttention
from interlace.worker.batch import ForwardBatch


class Sequence(NamedTuple):
    """Keys and values of a whole sequence, and queries of its last tokens."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @property
    def context(self) -> int:
        return len(self.key) - len(self.query)


def make_sequence(spec: AttentionSpec, context: int, length: int, dtype: torch.dtype = torch.float32) -> Sequence:
    return Sequence(
        torch.randn(length, spec.num_heads, spec.head_size).to(dtype),
        torch.randn(context + length, spec.num_kv_heads, spec.head_size).to(dtype),
        torch.randn(context + length, spec.num_kv_heads, spec.head_size).to(dtype),
    )


def dense(spec: AttentionSpec, sequence: Sequence) -> torch.Tensor:
    """The definition, in float64: [queries, heads, head_size]."""
    repeats = spec.num_heads // spec.num_kv_heads
    query = sequence.query.double().transpose(0, 1)
    key, value = (x.double().repeat_interleave(repeats, 1).transpose(0, 1) for x in (sequence.key, sequence.value))
    scores = query @ key.transpose(1, 2) * (spec.scale or spec.head_size**-0.5)
    if spec.softcap:
        scores = spec.softcap * (scores / spec.softcap).tanh()
    own = torch.arange(sequence.context, len(sequence.key))[:, None]
    other = torch.arange(len(sequence.key))[None]
    seen = other <= own
    if spec.kind == "window":
        seen &= other > own - spec.window
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1)


def run(
    spec: AttentionSpec,
    sequences: list[Sequence],
    block_size: int,
    dtype: str = "float32",
    poison: float = torch.nan,
) -> list[torch.Tensor]:
    """Put the sequences' context into a poisoned cache (blocks in random order, those out of the window missing),
    run one step, check what was written, and return the output of each sequence."""
    torch_dtype = getattr(torch, dtype)
    needed = [-(-len(sequence.key) // block_size) for sequence in sequences]
    num_blocks = sum(needed) + 3
    backend = TorchAttention(TorchAttention.Options(), spec, block_size, dtype, "cpu")
    layout = backend.cache_layout(num_blocks)
    assert layout.shape[0] == num_blocks
    cache = torch.full(layout.shape, poison, dtype=torch_dtype)
    assert cache.nbytes == layout.nbytes
    blocks = random.sample(range(1, num_blocks), sum(needed))
    table = torch.zeros(len(sequences), max(needed, default=0) + 2, dtype=torch.int32)
    slot_mapping: list[int] = []
    for row, sequence in enumerate(sequences):
        own = [blocks.pop() for _ in range(needed[row])]
        first_seen = max(0, sequence.context - spec.window + 1) if spec.kind == "window" else 0
        for index, block in enumerate(own):
            if (index + 1) * block_size > first_seen:
                table[row, index] = block
        for position in range(len(sequence.key)):
            slot = own[position // block_size], position % block_size
            if position >= sequence.context:
                slot_mapping.append(slot[0] * block_size + slot[1])
            elif position >= first_seen:
                cache[slot[0], slot[1], 0], cache[slot[0], slot[1], 1] = (
                    sequence.key[position],
                    sequence.value[position],
                )
    lengths = [len(sequence.query) for sequence in sequences]
    contexts = [sequence.context for sequence in sequences]
    positions = [c + i for c, n in zip(contexts, lengths, strict=True) for i in range(n)]
    batch = ForwardBatch(
        token_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        query_lens=lengths,
        context_lens=contexts,
        block_tables=[torch.empty(0), table],
        slot_mappings=[torch.empty(0), torch.tensor(slot_mapping, dtype=torch.int64)],
    )
    empty = [torch.empty(0, heads, spec.head_size, dtype=torch_dtype) for heads in (spec.num_heads, spec.num_kv_heads)]
    query = torch.cat([empty[0], *(sequence.query for sequence in sequences)])
    key = torch.cat([empty[1], *(sequence.key[sequence.context :] for sequence in sequences)])
    value = torch.cat([empty[1], *(sequence.value[sequence.context :] for sequence in sequences)])
    before = cache.clone()
    out = backend.forward(query, key, value, cache, backend.prepare(batch, 1))
    assert out.shape == query.shape and out.dtype == query.dtype
    written = cache.flatten(0, 1)[slot_mapping]
    assert torch.equal(written[:, 0], key) and torch.equal(written[:, 1], value)
    untouched = torch.ones(num_blocks * block_size, dtype=torch.bool)
    untouched[slot_mapping] = False
    assert torch.equal(
        cache.flatten(0, 1)[untouched].view(torch.uint8), before.flatten(0, 1)[untouched].view(torch.uint8)
    ), "other slots changed"
    return list(out.split(lengths))


def check(spec: AttentionSpec, sequences: list[Sequence], block_size: int, tolerance: float = 1e-5, **how) -> None:
    for actual, sequence in zip(run(spec, sequences, block_size, **how), sequences, strict=True):
        error = (actual.double() - dense(spec, sequence)).abs().max().item()
        assert error < tolerance, (spec, block_size, sequence.context, len(sequence.query))


def random_spec(rng: random.Random) -> AttentionSpec:
    kv_heads = rng.choice([1, 2, 3])
    window = rng.choice([0, 0, 1, 3, 8, 40])
    return AttentionSpec(
        num_heads=kv_heads * rng.choice([1, 2, 3, 4]),
        num_kv_heads=kv_heads,
        head_size=rng.choice([5, 8, 16, 64]),
        kind="window" if window else "full",
        window=window,
        softcap=rng.choice([0.0, 0.0, 1.5]),
        scale=rng.choice([0.0, 0.3]),
    )


@pytest.mark.parametrize("seed", range(60))
def test_random_layouts(seed):
    rng = random.Random(seed)
    random.seed(seed)
    torch.manual_seed(seed)
    spec = random_spec(rng)
    sequences = [
        make_sequence(spec, rng.choice([0, 0, 1, 5, 16, 50]), rng.choice([1, 1, 1, 2, 7, 33]))
        for _ in range(rng.randint(1, 9))
    ]
    check(spec, sequences, block_size=rng.choice([1, 4, 16, 32]))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_unwritten_slots_do_not_leak(poison, window, softcap):
    torch.manual_seed(0)
    kind = "window" if window else "full"
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=8, kind=kind, window=window, softcap=softcap)
    shapes = [(9, 1), (3, 1), (0, 1), (17, 1), (0, 5), (6, 4), (21, 13)]
    check(spec, [make_sequence(spec, *shape) for shape in shapes], block_size=4, poison=poison)


def test_empty_batch_and_single_token():
    spec = AttentionSpec(num_heads=6, num_kv_heads=2, head_size=8)
    assert run(spec, [], block_size=4) == []
    sequence = make_sequence(spec, 0, 1)
    (out,) = run(spec, [sequence], block_size=4)
    assert torch.allclose(out, sequence.value.repeat_interleave(3, 1)), "alone, a token sees its own value only"


@pytest.mark.parametrize("window", [0, 20])
def test_chunk_limits_change_nothing(monkeypatch, window):
    """Small limits cut decode rows and prefill queries into many chunks."""
    torch.manual_seed(0)
    monkeypatch.setattr(implementation, "_MAX_GATHERED", 64)
    monkeypatch.setattr(implementation, "_MAX_QUERIES", 8)
    kind = "window" if window else "full"
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, kind=kind, window=window)
    shapes = [(50, 1), (49, 1), (3, 1), (100, 1), (2, 1), (0, 45), (31, 23), (60, 3)]
    check(spec, [make_sequence(spec, *shape) for shape in shapes], block_size=16)


def test_gathers_are_bounded_and_padding_is_at_most_double(monkeypatch):
    monkeypatch.setattr(implementation, "_MAX_GATHERED", 1000)
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_size=8)
    backend = TorchAttention(TorchAttention.Options(), spec, 16, "float32", "cpu")
    rng = random.Random(3)
    lengths = sorted((rng.randint(1, 400) for _ in range(100)), reverse=True)
    chunks = backend._cut(lengths, list(range(100)))
    assert [row for chunk in chunks for row in chunk] == list(range(100))
    for chunk in chunks:
        assert lengths[chunk[0]] * len(chunk) <= 1000
        assert lengths[chunk[0]] <= 2 * lengths[chunk[-1]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types(dtype):
    torch.manual_seed(0)
    spec = AttentionSpec(num_heads=6, num_kv_heads=2, head_size=16)
    shapes = [(40, 1), (7, 1), (0, 30), (12, 9)]
    sequences = [make_sequence(spec, *shape, dtype=getattr(torch, dtype)) for shape in shapes]
    check(spec, sequences, block_size=8, tolerance=3e-2, dtype=dtype)


def test_supports():
    full = AttentionSpec(num_heads=1, num_kv_heads=1, head_size=7)
    assert TorchAttention.supports(full, 16, "bfloat16", "cpu") is None
    assert "not 'mla'" in (TorchAttention.supports(AttentionSpec(1, 1, 8, kind="mla"), 16, "float32", "cpu") or "")
    assert "empty" in (TorchAttention.supports(AttentionSpec(1, 1, 8, kind="window"), 16, "float32", "cpu") or "")
    assert "not in int8" in (TorchAttention.supports(full, 16, "int8", "cpu") or "")


def test_provider_is_listed():
    (provider,) = interlace_attention()
    assert provider.name == "torch" and provider.target == "interlace.plugins.attention.torch:TorchAttention"

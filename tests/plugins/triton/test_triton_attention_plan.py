"""How steps are cut into pieces, and sequences into splits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from interlace.plugins.triton.attention_config import KernelConfig, LayerShape, decode_lanes
from interlace.plugins.triton.attention_parts import split_size, splits_of
from interlace.plugins.triton.attention_plan import cut_invariant, cut_rows


def shape_of(kv_heads=2, group=4, window=0):
    return LayerShape(kv_heads, group, 64, 16, 2, False, window, False)


def tokens_of(cuts):
    """(row, place in the batch, length of the sequence with it) of every token of all pieces."""
    return sorted(
        (int(row), int(start) + i, int(end) - int(count) + i + 1)
        for cut in cuts
        for row, start, count, end in cut.array.T
        for i in range(count)
    )


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_in_one_piece(seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 9)
    query_lens = rng.choice([1, 1, 1, 2, 5, 8, 9, 100, 1000], rows).astype(np.int64)
    context_lens = rng.integers(0, 3000, rows)
    starts = np.cumsum(query_lens) - query_lens
    wanted = sorted(
        (row, starts[row] + i, context_lens[row] + i + 1) for row in range(rows) for i in range(query_lens[row])
    )
    decode, prefill = cut_rows(query_lens, context_lens, 8, 32)
    assert tokens_of([*decode, prefill]) == wanted
    assert all(cut.array[2].max() <= cut.most and cut.array[2].min() > cut.most // 2 for cut in decode)
    assert [cut.most for cut in decode] == sorted({1 << (int(n) - 1).bit_length() for n in query_lens if n <= 8})
    assert (np.diff(prefill.array[3]) <= 0).all(), "longest work first"
    pieces = list(cut_invariant(query_lens, context_lens, 4, 10))
    assert tokens_of(pieces) == wanted
    for cut in pieces:
        assert cut.array.shape[1] <= 10 and cut.array[2].max(initial=0) <= 4
        first, last = cut.array[3] - cut.array[2], cut.array[3] - 1
        assert (first // 4 == last // 4).all()


@triton.jit
def _sizes(spans, out, MAX_SPLITS: tl.constexpr, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    tl.store(out + places, split_size(tl.load(spans + places), MAX_SPLITS))


@pytest.mark.parametrize("kv_heads", [1, 4, 8, 32])
def test_splits_follow_from_the_length(kv_heads):
    shape = shape_of(kv_heads)
    edges = [edge + d for edge in (128, 1024, 2048, 8192, 16384, 65536, 131072, 1 << 20) for d in (-1, 0, 1, 700)]
    spans = torch.tensor([1, 2, 100, *edges] + [1] * (64 - 3 - len(edges)), dtype=torch.int32)
    sizes = torch.empty_like(spans)
    _sizes[(1,)](spans, sizes, MAX_SPLITS=shape.max_splits, COUNT=64)
    splits = -(-spans // sizes)
    assert (splits <= shape.max_splits).all()
    assert set(sizes.tolist()) <= {1 << power for power in range(7, 20)}
    for span, found in zip(spans.tolist(), splits.tolist(), strict=True):
        assert found <= shape.split_slots(span, 1), span
        assert found <= shape_of(kv_heads, window=span).split_slots(10 * span, 1) - 1
    by_thousand = {}  # the size may change at multiples of 1,024 only: pieces of the invariant backend rely on it
    for span, size in zip(spans.tolist(), sizes.tolist(), strict=True):
        assert by_thousand.setdefault((span - 1) // 1024, size) == size, span


@triton.jit
def _splits(seq_lens, out, TOKENS: tl.constexpr, WINDOW: tl.constexpr, MAX_SPLITS: tl.constexpr, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    _, _, splits, _ = splits_of(TOKENS, tl.load(seq_lens + places), WINDOW, MAX_SPLITS)
    tl.store(out + places, splits)


@pytest.mark.parametrize("window", [0, 1, 127, 128, 512, 1024, 1100, 4096])
@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_no_piece_has_more_splits_than_there_is_room_for(window, count):
    """Also where the keys that several tokens see begin at the end of a split, wherever the window lies."""
    shape = shape_of(8, window=window)
    seq_lens = torch.arange(count, count + 8192, dtype=torch.int32)
    splits = torch.empty_like(seq_lens)
    _splits[(1,)](seq_lens, splits, count, window, shape.max_splits, len(seq_lens))
    room = torch.tensor([shape.split_slots(length, count) for length in seq_lens.tolist()])
    assert (splits <= room).all()


def test_slots_hold_for_every_shorter_sequence():
    shape = shape_of(8)
    slots = [shape.split_slots(length, 1) for length in range(1, 20000)]
    assert all(a <= b for a, b in itertools.pairwise(slots))


def test_lanes_fill_the_device():
    assert decode_lanes(1, 8, 32, 132) == 32  # a single sequence: every split its own program
    assert decode_lanes(256, 8, 32, 132) == 1
    assert decode_lanes(16, 8, 32, 132) == 5


@pytest.mark.parametrize(("group", "most"), [(1, 8), (4, 8), (8, 8), (9, 4), (16, 4), (33, 1), (128, 1)])
def test_verified_tokens_fit_a_program(group, most):
    shape = shape_of(group=group)
    assert shape.max_verify == most
    assert shape.decode_rows(most) >= group * most


def test_a_piece_holds_whole_tokens():
    assert shape_of(group=3).prefill_count(KernelConfig(128, 64, 4, 2)) == 42

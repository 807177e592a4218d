"""Cuts the rows of a step into the pieces that programs work on. On the host, with arrays, once per step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]


class Cut(NamedTuple):
    """Pieces for one launch: [4, pieces] int32 in the order of `attention_decode.Pieces`."""

    array: npt.NDArray[np.int32]
    most: int
    """Tokens that a piece has at most."""
    max_seq_len: int


def cut_rows(query_lens: Array, context_lens: Array, max_verify: int, prefill_count: int) -> tuple[list[Cut], Cut]:
    """(pieces for the decode kernel, pieces for the prefill kernel), the former by a power of two of their tokens, so
    that what serves a row follows from that row alone. Longest work comes first."""
    starts = _starts(query_lens)
    decode = []
    count = 1
    while count <= max_verify:
        rows = np.flatnonzero((query_lens > count // 2) & (query_lens <= count))
        if len(rows):
            decode.append(_cut(rows, starts[rows], query_lens[rows], (context_lens + query_lens)[rows], count))
        count *= 2
    rows = np.flatnonzero(query_lens > max_verify)
    pieces = -(-query_lens[rows] // prefill_count)
    row = np.repeat(rows, pieces)
    ends = np.cumsum(pieces)
    done = (np.arange(len(row)) - np.repeat(ends - pieces, pieces)) * prefill_count  # of the row, before the piece
    counts = np.minimum(query_lens[row] - done, prefill_count)
    prefill = _cut(row, starts[row] + done, counts, context_lens[row] + done + counts, prefill_count)
    longest_first = np.argsort(-prefill.array[3], kind="stable")
    return decode, prefill._replace(array=np.ascontiguousarray(prefill.array[:, longest_first]))


def cut_invariant(query_lens: Array, context_lens: Array, count: int, max_pieces: int) -> Iterator[Cut]:
    """All rows for the decode kernel, in pieces that end where the position is a multiple of `count`, a power of two:
    so what a token is computed with follows from its position, and splits change their size between pieces only. At
    most `max_pieces` to a launch."""
    pieces: list[tuple[int, int, int, int]] = []
    for row, (start, length, context) in enumerate(zip(_starts(query_lens), query_lens, context_lens, strict=True)):
        done = 0
        while done < length:
            end = min(length, ((context + done) // count + 1) * count - context)
            pieces.append((row, start + done, end - done, context + end))
            done = end
    for first in range(0, len(pieces), max_pieces):
        rows, starts, counts, seq_lens = np.array(pieces[first : first + max_pieces], dtype=np.int64).T
        yield _cut(rows, starts, counts, seq_lens, count)


def _starts(query_lens: Array) -> Array:
    return np.cumsum(query_lens) - query_lens


def _cut(rows: Any, starts: Any, counts: Any, seq_lens: Any, count: int) -> Cut:
    array = np.stack((rows, starts, counts, seq_lens)).astype(np.int32)
    return Cut(array, count, int(seq_lens.max(initial=0)))

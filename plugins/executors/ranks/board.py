"""`Board`: tensors exchanged between the tensor ranks of one stage through shared memory.

Every rank has two places on the board, used in turn. In a round each writes its tensor into its place, signals all
others (eventfd, one per direction and pair), and waits for theirs; then all are to be seen. One meeting per round is
enough: whoever writes into a place again has met everybody in the round between, and a rank signals a round only when
it has done with the one before.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence

import torch

from interlace.plugins.executors.ranks.meeting import PLACE_BYTES, BoardSeat

_MAX_VIEWS = 512
_Kind = tuple[torch.Size, tuple[int, ...] | None, torch.dtype]
"""What is exchanged: shape on this rank, length of its last dimension on each if that is not the same, and type."""


class Board:
    """One rank's end; used from one thread."""

    def __init__(self, seat: BoardSeat) -> None:
        self._size = len(seat.raises)
        self._rank = seat.rank
        self._raises = [fd for fd in seat.raises if fd >= 0]
        self._awaits = [fd for fd in seat.awaits if fd >= 0]
        self._raised = [0] * len(self._awaits)  # rounds of each peer that we have not waited for yet
        self._round = 0
        data = mmap.mmap(seat.memory, 2 * self._size * PLACE_BYTES)
        self._places = torch.frombuffer(data, dtype=torch.uint8).view(2, self._size, PLACE_BYTES)
        self._views: dict[_Kind, tuple[tuple[torch.Tensor, ...], ...]] = {}

    def exchange(self, x: torch.Tensor, widths: tuple[int, ...] | None = None) -> tuple[torch.Tensor, ...]:
        """`x` of every rank, in rank order; valid until the second exchange from now.

        `x`: contiguous, at most `PLACE_BYTES`, of the same dtype and shape on all ranks, but for the last dimension if
        `widths` says what that is on each."""
        places = self._view((x.shape, widths, x.dtype))[self._round & 1]
        places[self._rank].copy_(x)
        for descriptor in self._raises:
            os.eventfd_write(descriptor, 1)
        raised = self._raised
        for peer, descriptor in enumerate(self._awaits):
            while not raised[peer]:
                raised[peer] = int.from_bytes(os.read(descriptor, 8), "little")
            raised[peer] -= 1
        self._round += 1
        return places

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks in rank order, so with the same bits on all; written into `x`, which is contiguous."""
        flat = x.view(-1)
        length = PLACE_BYTES // x.element_size()
        for start in range(0, flat.numel(), length):
            piece = flat[start : start + length] if flat.numel() > length else flat
            self._sum_into(piece, self.exchange(piece))
        return x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        """`x` [..., widths[rank]], contiguous, of all ranks, side by side in the last dimension; None if a row of one
        is too long for the board."""
        length = PLACE_BYTES // max(1, max(widths) * x.element_size())
        if not length:
            return None
        widths = tuple(widths)
        rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])
        if 0 < len(rows) <= length:
            gathered = torch.cat(self.exchange(rows, widths), dim=1)
        else:
            gathered = x.new_empty((len(rows), sum(widths)))
            for start in range(0, len(rows), length):
                parts = self.exchange(rows[start : start + length], widths)
                torch.cat(parts, dim=1, out=gathered[start : start + length])
        return gathered if x.dim() == 2 else gathered.view(*x.shape[:-1], gathered.shape[1])

    def _sum_into(self, total: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> None:
        if self._size == 2:
            torch.add(parts[0], parts[1], out=total)
        elif total.dtype is torch.float32:
            torch.add(parts[0], parts[1], out=total)
            for part in parts[2:]:
                total += part
        else:  # rounded once
            total.copy_(torch.stack(parts).sum(0, dtype=torch.float32))

    def _view(self, kind: _Kind) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Of either half of the board: what each rank has in its place."""
        views = self._views.get(kind)
        if views is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            shape, widths, dtype = kind
            shapes = [(*shape[:-1], width) for width in widths or (shape[-1],) * self._size]
            views = tuple(
                tuple(place.view(dtype)[: math.prod(of)].view(of) for place, of in zip(half, shapes, strict=True))
                for half in self._places
            )
            self._views[kind] = views
        return views

"""`Rendezvous`: where a rank finds the others of its executor, and what it means to lose one. No torch."""

from __future__ import annotations

import os

import msgspec

from interlace.errors import InterlaceError


class PeerLostError(InterlaceError):
    """An exchange with other ranks failed. Why is known to the one that is gone."""


def lost_a_peer(error: BaseException | None) -> bool:
    """Whether `error` comes of a `PeerLostError`."""
    while error is not None:
        if isinstance(error, PeerLostError):
            return True
        error = error.__cause__
    return False


PLACE_BYTES = 1 << 20
"""Bytes that a rank can show on a board at a time; what is longer passes in pieces."""


class BoardSeat(msgspec.Struct, frozen=True):
    """What one rank needs of a `Board`: file descriptors, which it inherits under the same numbers."""

    memory: int
    rank: int
    raises: tuple[int, ...]
    """By rank: the counter that says to it that our tensor is there; our own entry is not used."""
    awaits: tuple[int, ...]
    """By rank: the counter that says that its tensor is there."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.memory, *(fd for fd in (*self.raises, *self.awaits) if fd >= 0))


def make_seats(size: int) -> list[BoardSeat]:
    """The seats of a new board for `size` ranks. Whoever makes them closes their descriptors."""
    memory = os.memfd_create("interlace-board")
    os.ftruncate(memory, 2 * size * PLACE_BYTES)
    counters = [[os.eventfd(0) if to != of else -1 for to in range(size)] for of in range(size)]
    return [
        BoardSeat(memory, rank, tuple(counters[rank]), tuple(counters[of][rank] for of in range(size)))
        for rank in range(size)
    ]


class Rendezvous(msgspec.Struct, frozen=True, kw_only=True):
    """Where ranks find each other."""

    file: str = ""
    """A file that all ranks can open and lock: ranks of one machine."""
    address: str = ""
    """`host:port` of a TCP store that is served by somebody else: ranks of several machines."""
    interface: str = ""
    """Network interface that gloo connects over; empty: the one that the host's name belongs to."""
    host: str = ""
    """This machine's address that gloo connects from and to; it comes before `interface`."""
    timeout_s: float = 600.0
    """How long to wait for the others."""
    board: BoardSeat | None = None
    """This rank's seat at the board of its stage, where collectives are to go through shared memory."""

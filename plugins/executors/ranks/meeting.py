"""`Rendezvous`: where the ranks of one executor find each other, and what it means to lose one. No torch."""

from __future__ import annotations

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

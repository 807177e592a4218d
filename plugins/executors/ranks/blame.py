"""Which of the troubles of several ranks is the cause, and which are its consequences.

Ranks that work together end together: the survivors of a death complain of what they miss, and the news arrive in any
order, also at once. So what counts is what kind of news it is, and only among equals which was noticed first.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple


class Sort(IntEnum):
    """What kind of trouble it is; the lesser the number, the likelier it is the cause."""

    KILLED = 0
    """A signal from outside or a fault of memory ended it."""
    FAILED = 1
    """It raised an error of its own."""
    ENDED = 2
    """It ended without a word, by `abort` or `exit`: libraries do that, too, when a peer is gone."""
    MISSED_A_PEER = 3
    """It says no more than that another rank is gone."""


class Trouble(NamedTuple):
    """Something after which the ranks cannot go on."""

    rank: int
    error: Exception
    sort: Sort


PATIENCE = {Sort.KILLED: 0.0, Sort.FAILED: 0.2, Sort.ENDED: 1.0, Sort.MISSED_A_PEER: 1.0}
"""Seconds to wait for something likelier to be the cause, by the sort of what is known."""


def blame(found: Sequence[Trouble]) -> Trouble:
    """The cause among `found`, which is not empty and in the order of notice; per rank the first thing noticed of it is
    enough."""
    return min(found, key=lambda trouble: trouble.sort)

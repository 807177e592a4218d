"""Time is injected: core reads a `Clock`, never `time.*`, so that simulation and tests own the time."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Protocol


class Clock(Protocol):
    """A source of seconds. Only differences matter; the zero is arbitrary."""

    def now(self) -> float:
        """Seconds, never going backwards."""
        ...


class MonotonicClock:
    """Real time. The same zero in every process of one machine."""

    now = staticmethod(time.monotonic)  # no frame in between: it is read several times a step


class ShiftedClock:
    """Real time as another machine counts it."""

    def __init__(self, offset: float) -> None:
        """`offset`: seconds that its clock is ahead of this machine's."""
        self._offset = offset

    def now(self) -> float:
        return time.monotonic() + self._offset


class VirtualClock:
    """Time that moves only when told to; for tests and simulation."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> float:
        """Move forward by `seconds` and return the new time."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back (advance by {seconds})")
        self._now += seconds
        return self._now


def local_time() -> datetime:
    """The wall clock in local time: for dates that people or models read, never for durations."""
    return datetime.now()

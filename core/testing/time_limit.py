"""`time_limit`: end what does not end by itself, at the line where it hangs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from interlace.clock import MonotonicClock


class OutOfTimeError(BaseException):
    """Raised where the code stood when its time was up. Not an `Exception`, so that nothing forgives it."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise `OutOfTimeError` in the block after `seconds`; `what` says in the message what took so long.

    Uses SIGALRM, and puts back whatever used it before (such as a time-out of pytest). Without effect outside the main
    thread and on systems without that signal."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise OutOfTimeError(f"{what} has not ended after {seconds:g} s")

    clock = MonotonicClock()
    outer, _ = signal.setitimer(signal.ITIMER_REAL, 0)  # so that the outer alarm meets its own handler, or none
    began = clock.now()
    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # the alarm may come at the last moment
            signal.signal(signal.SIGALRM, handler)
            if outer:
                signal.setitimer(signal.ITIMER_REAL, max(0.001, outer - (clock.now() - began)))

"""Notices an engine loop that is stuck: in a step, in a policy, in an executor that never answers."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from interlace.clock import Clock

LOOKS = 8
"""Looks at the loop per timeout: a hang is noticed at most an eighth of the timeout late."""

OnHang = Callable[[TimeoutError, str], None]
"""(what happened, the state of the engine and of all threads as text); called once, from the watchdog's thread."""


class Watched(Protocol):
    """The loop, as far as the watchdog looks at it."""

    beat: int
    waiting: bool

    def hang_report(self) -> str: ...


class StepWatchdog:
    """Watches one loop while the context is open. The loop pays one attribute store each time it comes round.

    A thread looks at the loop `LOOKS` times per timeout. Time in which this thread was not running either, because the
    process was stopped or the machine suspended, does not count.
    """

    def __init__(self, loop: Watched, clock: Clock, timeout: float, on_hang: OnHang) -> None:
        self._loop = loop
        self._clock = clock
        self._timeout = timeout
        self._on_hang = on_hang
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="interlace-watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._watched = threading.current_thread()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        interval = self._timeout / LOOKS
        beat, stuck, last = -1, 0.0, self._clock.now()
        while not self._stop.wait(interval):
            now = self._clock.now()
            if self._loop.waiting or self._loop.beat != beat:
                beat, stuck = self._loop.beat, 0.0
            else:
                stuck += min(now - last, 2 * interval)
            last = now
            if stuck >= self._timeout:
                error = TimeoutError(
                    f"the engine loop is stuck: a step has been running for {stuck:.1f} s "
                    f"(engine.step_timeout_s = {self._timeout:g})"
                )
                self._on_hang(error, f"{self._loop.hang_report()}\n{describe_threads(self._watched)}")
                return


def describe_threads(first: threading.Thread) -> str:
    """The Python stacks of all threads but this one, that of `first` at the top."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda thread: (thread is not first, thread.name))
    parts = []
    for thread in threads:
        frame = frames.get(thread.ident or 0)
        if frame is not None and thread is not threading.current_thread():
            parts.append(f"thread {thread.name}:\n{''.join(traceback.format_stack(frame))}".rstrip())
    return "\n".join(parts)

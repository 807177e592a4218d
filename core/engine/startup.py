"""While an engine starts: a bar on the terminal, and no garbage collection."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from interlace.interfaces.executor import ExecutorEvent


class StartupProgress:
    """Shows `progress` events of the executor on stderr while the context is open; nothing where it is no terminal.

    Events may come from any thread."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def show(self, event: ExecutorEvent) -> None:
        """A `progress` event with `done` and `total` in its detail; others and late ones are ignored."""
        bar = self._bar
        if bar is None or event.kind != "progress":
            return
        if event.message not in self._tasks:
            self._tasks[event.message] = bar.add_task(event.message.capitalize())
        bar.update(self._tasks[event.message], completed=event.detail.get("done"), total=event.detail.get("total"))


@contextmanager
def paused_gc() -> Iterator[None]:
    """No garbage collection in the block, and what it made counts as old afterwards. Imports make two hundred thousand
    objects that stay; looking through them again and again for garbage is a sixth of the time that torch takes to
    import, and the next collection, had it to look through them as young ones, would take a tenth of a second."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.unfreeze()  # into the oldest generation: a young one would be looked through at once
            gc.enable()

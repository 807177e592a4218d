"""Built-in executors."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_executors() -> Iterable[Provider]:
    return ()

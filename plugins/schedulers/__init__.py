"""Built-in schedulers."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_schedulers() -> Iterable[Provider]:
    return ()

"""Built-in attention."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_attention() -> Iterable[Provider]:
    return ()

"""Built-in models."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_models() -> Iterable[Provider]:
    return ()

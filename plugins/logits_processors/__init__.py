"""Built-in logits_processors."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_logits_processors() -> Iterable[Provider]:
    return ()

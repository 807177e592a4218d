"""Built-in orderings, for schedulers that combine several (`scheduler.use = "ordered"`)."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_orderings() -> Iterable[Provider]:
    """`fcfs`, `priority`, `shortest-prompt` and `fewest-remaining`."""
    package = "interlace.plugins.orderings"
    return (
        Provider(name="fcfs", target=f"{package}.arrival:Fcfs", summary="first come, first served", api="1"),
        Provider(
            name="priority",
            target=f"{package}.arrival:Priority",
            summary="lower priority number first, optional aging",
            api="1",
        ),
        Provider(
            name="shortest-prompt",
            target=f"{package}.length:ShortestPrompt",
            summary="fewest prompt tokens first",
            api="1",
        ),
        Provider(
            name="fewest-remaining",
            target=f"{package}.length:FewestRemaining",
            summary="fewest tokens left to compute first, at most (prompt plus max_tokens)",
            api="1",
        ),
    )

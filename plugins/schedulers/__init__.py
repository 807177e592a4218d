"""Built-in scheduling policies."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_schedulers() -> Iterable[Provider]:
    """`fcfs`, `priority` and `ordered`."""
    package = "interlace.plugins.schedulers"
    return (
        Provider(name="fcfs", target=f"{package}.fcfs:Fcfs", summary="first come, first served", api="1"),
        Provider(
            name="priority",
            target=f"{package}.priority:Priority",
            summary="lower priority number first, arrival breaks ties, optional aging",
            api="1",
        ),
        Provider(
            name="ordered",
            target=f"{package}.ordered:Ordered",
            summary="any orderings, combined in the order given",
            api="1",
        ),
    )

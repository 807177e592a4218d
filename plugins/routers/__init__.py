"""Built-in routers, which choose a replica for each request where `engine.replicas` is more than 1."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_routers() -> Iterable[Provider]:
    """`prefix_affinity`, `least_loaded` and `round_robin`."""
    package = "interlace.plugins.routers"
    return (
        Provider(
            name="prefix_affinity",
            target=f"{package}.prefix_affinity:PrefixAffinity",
            summary="where the beginning of the prompt is cached, unless that replica is much busier",
            api="1",
        ),
        Provider(
            name="least_loaded",
            target=f"{package}.least_loaded:LeastLoaded",
            summary="the least busy replica; waiting requests count more than running ones",
            api="1",
        ),
        Provider(
            name="round_robin",
            target=f"{package}.round_robin:RoundRobin",
            summary="one replica after the other",
            api="1",
        ),
    )

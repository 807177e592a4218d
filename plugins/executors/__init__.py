"""Built-in executors."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_executors() -> Iterable[Provider]:
    """`uniprocess`, `multiprocess`, `ray`."""
    return (
        Provider(
            name="uniprocess",
            target="interlace.plugins.executors.uniprocess:UniprocessExecutor",
            summary="one worker inside the engine's process",
            api="1",
        ),
        Provider(
            name="multiprocess",
            target="interlace.plugins.executors.multiprocess:MultiprocessExecutor",
            summary="a process per rank: tensor and pipeline parallelism on one machine",
            api="1",
        ),
        Provider(
            name="ray",
            target="interlace.plugins.executors.ray:RayExecutor",
            summary="a Ray actor per rank: tensor and pipeline parallelism on one machine or several",
            api="1",
            host="interlace.plugins.executors.cluster.engine_link:ray_host",
        ),
    )

"""Built-in attention backends."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_attention() -> Iterable[Provider]:
    yield Provider(
        name="torch",
        target="interlace.plugins.attention.torch:TorchAttention",
        summary="readable reference: any device, windows, soft cap",
        api="1",
        options="interlace.interfaces.attention:AttentionBackend.Options",  # none of its own
    )

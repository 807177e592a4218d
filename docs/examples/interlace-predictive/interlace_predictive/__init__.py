"""Shortest predicted remaining work first. Every engine imports this module at start-up, so it only names things."""

from __future__ import annotations

from collections.abc import Iterable

from interlace import Provider, hookimpl


@hookimpl
def interlace_schedulers() -> Iterable[Provider]:
    yield Provider(
        name="predictive",
        target="interlace_predictive.scheduler:ShortestPredicted",
        options="interlace_predictive.options:PredictiveOptions",
        summary="shortest predicted remaining work first; learns output lengths, waiting makes up for length",
        api="1",
    )

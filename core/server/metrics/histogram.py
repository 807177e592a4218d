"""`Histogram`: counts per bucket that are cheap to add to; the client library's own take microseconds per value."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence


def geometric(first: float, last: float, per_decade: Sequence[float] = (1, 1.5, 2, 3, 5, 7)) -> tuple[float, ...]:
    """Bounds `first` × (steps of `per_decade`) × powers of ten, up to `last`. Rounded, so that they read well."""
    bounds: list[float] = []
    decade = first
    while not bounds or bounds[-1] < last:
        bounds += [float(f"{decade * step:.6g}") for step in per_decade if decade * step <= last * 1.000001]
        decade *= 10
        if decade > last:
            break
    return tuple(bounds)


SECONDS = geometric(0.001, 1000.0)
"""For times of requests: 1 ms to 17 min."""
GAP_SECONDS = geometric(0.0005, 50.0, (1, 1.5, 2, 3, 4, 6, 8))
"""For times between tokens and of steps: 0.5 ms to 50 s."""
BLOCK_SECONDS = geometric(0.001, 100_000.0, (1, 2, 5))
"""For the lives of KV blocks: 1 ms to a day."""
TOKENS = geometric(1, 1_000_000, (1, 2, 5))
COUNTS = (0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""For small numbers such as `n` and preemptions."""


class Histogram:
    """Values by upper bound (inclusive), their sum and their number."""

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last one is beyond all bounds
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        return sum(self._counts)

    def cumulative(self) -> Iterator[tuple[str, float]]:
        """(upper bound as text, values up to it), as Prometheus has it; the last bound is `+Inf`."""
        seen = 0
        for bound, count in zip(self._bounds, self._counts, strict=False):
            seen += count
            yield repr(float(bound)), seen
        yield "+Inf", seen + self._counts[-1]

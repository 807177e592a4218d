"""What a benchmark measures, as small pure functions of recorded times.

The definitions are the field's. Of one request: TTFT is submission to first output token; ITL the time between
consecutive output tokens; E2E latency is TTFT plus all ITL; TPOT is (E2E - TTFT) / (output tokens - 1).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import msgspec


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """One finished request: when it was submitted and when each of its output tokens came, in clock seconds."""

    arrival: float
    tokens: list[float]
    """Never empty, never decreasing; several tokens of one step share a time."""
    num_prompt_tokens: int
    num_cached_tokens: int = 0

    @property
    def ttft(self) -> float:
        """Time to first token, seconds."""
        return self.tokens[0] - self.arrival

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies, seconds: one fewer than there are tokens."""
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]

    @property
    def e2e(self) -> float:
        """End-to-end latency, seconds."""
        return self.tokens[-1] - self.arrival

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, seconds; None of a single token."""
        count = len(self.tokens)
        return None if count < 2 else (self.e2e - self.ttft) / (count - 1)


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Many measured values, in their own unit."""

    count: int
    mean: float
    median: float
    p90: float
    p99: float
    min: float
    max: float


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A figure measured in several runs."""

    median: float
    min: float
    max: float


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values `ordered` upwards lie, interpolated between neighbours."""
    if not ordered:
        raise ValueError("there is no percentile of no values")
    place = (len(ordered) - 1) * share
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distribution(values: Iterable[float]) -> Distribution | None:
    """Mean, median and tails of `values`; None if there are none."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Distribution(
        count=len(ordered),
        mean=statistics.fmean(ordered),
        median=percentile(ordered, 0.5),
        p90=percentile(ordered, 0.9),
        p99=percentile(ordered, 0.99),
        min=ordered[0],
        max=ordered[-1],
    )


def spread(values: Iterable[float]) -> Spread:
    """Median and range of a figure over runs; there is at least one."""
    ordered = sorted(values)
    return Spread(median=percentile(ordered, 0.5), min=ordered[0], max=ordered[-1])


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies of many requests, in seconds; None where no request has such a time."""

    ttft_s: Distribution | None
    itl_s: Distribution | None
    tpot_s: Distribution | None
    e2e_s: Distribution | None


def latencies(timelines: Sequence[Timeline]) -> Latencies:
    """Distributions over all requests; ITL over all pairs of consecutive tokens of all requests."""
    return Latencies(
        ttft_s=distribution(timeline.ttft for timeline in timelines),
        itl_s=distribution(gap for timeline in timelines for gap in timeline.itl),
        tpot_s=distribution(tpot for timeline in timelines if (tpot := timeline.tpot) is not None),
        e2e_s=distribution(timeline.e2e for timeline in timelines),
    )


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One timed pass over a workload."""

    started: float
    """When the requests were handed in, in clock seconds."""
    timelines: list[Timeline]
    """In the order of the workload."""
    steps: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    """Tokens of those found."""
    plugin_seconds: dict[str, float] = {}
    """`kind:name` → seconds spent in each plugin, as of `StepStats`."""


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What one run amounts to."""

    duration_s: float
    """From handing in the requests to the last token of the last one."""
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    """Prompt and output tokens."""


def rates(run: Run) -> Rates:
    """Throughput of one run."""
    duration = max(timeline.tokens[-1] for timeline in run.timelines) - run.started
    prompt = sum(timeline.num_prompt_tokens for timeline in run.timelines)
    output = sum(len(timeline.tokens) for timeline in run.timelines)
    return Rates(
        duration_s=duration,
        requests_per_s=len(run.timelines) / duration,
        output_tokens_per_s=output / duration,
        total_tokens_per_s=(prompt + output) / duration,
    )

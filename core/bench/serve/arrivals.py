"""When requests are sent: arrival processes of constant or changing rate, all drawn from a seed.

A changing rate uses time rescaling: arrivals of rate 1 at s₁, s₂, … become arrivals of rate r(t) at Λ⁻¹(s₁), Λ⁻¹(s₂), …
where Λ(t) is the integral of r from 0 to t. So every process can be ramped, and a constant rate is no special case.
"""

from __future__ import annotations

import math
import random
from typing import Literal

import msgspec

from interlace.bench.workloads import WorkloadError

Process = Literal["poisson", "gamma", "constant", "closed", "trace"]
RampShape = Literal["linear", "exponential"]


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """Requests per second, from `start` to `end` within `duration_s`, and `end` after that."""

    start: float
    end: float
    shape: RampShape = "linear"
    duration_s: float | None = None
    """None: the ramp ends with the last request."""

    def __post_init__(self) -> None:
        for value in (self.start, self.end):
            if not (math.isfinite(value) and value > 0):
                raise WorkloadError(f"a request rate must be a finite number above 0, not {value:g}")
        if self.duration_s is not None and not (math.isfinite(self.duration_s) and self.duration_s > 0):
            raise WorkloadError(f"a ramp must take some seconds, not {self.duration_s:g}")

    def describe(self) -> str:
        if self.start == self.end:
            return f"{self.start:g} requests/s"
        over = "the run" if self.duration_s is None else f"{self.duration_s:g} s"
        return f"{self.start:g} to {self.end:g} requests/s ({self.shape}, over {over})"


class Arrivals(msgspec.Struct, frozen=True, kw_only=True):
    """How requests arrive. `closed`: each is sent as soon as one before it is done, up to the concurrency limit."""

    process: Process = "closed"
    rate: Rate | None = None
    """Of `poisson`, `gamma` and `constant`."""
    burstiness: float = 1.0
    """Shape of `gamma`: below 1 is burstier than Poisson, 1 is Poisson, above 1 is more even."""
    time_scale: float = 1.0
    """Of `trace`: its times are multiplied by this; 0.5 is twice as fast."""

    def describe(self) -> str:
        """In words, for the report."""
        if self.process == "closed":
            return "closed loop"
        if self.process == "trace":
            return "as the trace says" + ("" if self.time_scale == 1.0 else f", times × {self.time_scale:g}")
        more = f" (burstiness {self.burstiness:g})" if self.process == "gamma" else ""
        return f"{self.process}{more}, {self.rate.describe() if self.rate else ''}"


def arrival_times(arrivals: Arrivals, count: int, seed: int, trace: list[float] | None = None) -> list[float]:
    """Seconds from the start at which each of `count` requests is due, never decreasing, the first one at 0.

    `trace` holds a trace's own times. Raises `WorkloadError` if the process needs a rate or a trace that is missing."""
    if arrivals.process == "closed":
        return [0.0] * count
    if arrivals.process == "trace":
        if trace is None:
            raise WorkloadError("this workload has no times of its own: give a request rate")
        return [(time - trace[0]) * arrivals.time_scale for time in trace[:count]]
    if arrivals.rate is None:
        raise WorkloadError(f"{arrivals.process} arrivals need a request rate")
    if not (math.isfinite(arrivals.burstiness) and arrivals.burstiness > 0):
        raise WorkloadError(f"burstiness must be a finite number above 0, not {arrivals.burstiness:g}")
    draw = random.Random(seed)
    times, place = [], 0.0
    for _ in range(count):
        times.append(_time_of(place, arrivals.rate, count))
        place += _gap(arrivals, draw)
    return times


def _gap(arrivals: Arrivals, draw: random.Random) -> float:
    """An interval of a process of rate 1."""
    if arrivals.process == "constant":
        return 1.0
    shape = arrivals.burstiness if arrivals.process == "gamma" else 1.0
    return draw.gammavariate(shape, 1.0 / shape)


def _time_of(place: float, rate: Rate, count: int) -> float:
    """Λ⁻¹(place): when the rate has amounted to `place` requests."""
    first, last = rate.start, rate.end
    if first == last:
        return place / first
    is_linear = rate.shape == "linear"
    mean = (first + last) / 2 if is_linear else (last - first) / math.log(last / first)
    duration = count / mean if rate.duration_s is None else rate.duration_s
    ramped = mean * duration
    if place >= ramped:
        return duration + (place - ramped) / last
    if is_linear:  # a t + (b - a) t² / 2T = place, in the form that loses no digits
        slope = (last - first) / duration
        return 2 * place / (first + math.sqrt(first * first + 2 * slope * place))
    growth = math.log(last / first)
    return duration / growth * math.log1p(place * growth / (first * duration))

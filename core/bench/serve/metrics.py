"""What a run amounts to: pure functions of the exchanges, with the definitions of `interlace.bench.metrics`.

Only whole answers count as successes: throughput, latencies and goodput leave out every request that failed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import msgspec

from interlace.bench.metrics import Distribution, Latencies, distribution
from interlace.bench.serve.client import Exchange
from interlace.bench.workloads import WorkloadError
from interlace.errors import did_you_mean

SLO_NAMES = ("ttft", "tpot", "e2e")
TIMELINE_BINS = 100
_UNITS = {"ms": 1e-3, "s": 1.0, "": 1.0}


def ttft(exchange: Exchange) -> float:
    """Sending to the first output token, seconds."""
    return exchange.chunk_times[0] - exchange.sent


def e2e(exchange: Exchange) -> float:
    """Sending to the last output token, seconds."""
    return exchange.chunk_times[-1] - exchange.sent


def tpot(exchange: Exchange) -> float | None:
    """Time per output token after the first, seconds; None of a single token."""
    tokens = exchange.num_tokens
    return None if tokens < 2 else (e2e(exchange) - ttft(exchange)) / (tokens - 1)


def gaps(exchange: Exchange) -> list[float]:
    """Inter-token latencies, seconds. Tokens of one chunk came together, as far as the server says how many they are;
    where it does not, these are the times between chunks."""
    found: list[float] = []
    before: float | None = None
    for time, tokens in zip(exchange.chunk_times, exchange.chunk_tokens, strict=True):
        if before is not None:
            found.append(time - before)
        found += [0.0] * (tokens - 1)
        before = time
    return found


def serve_latencies(exchanges: Sequence[Exchange]) -> Latencies:
    """Distributions over successes; ITL over all gaps of all of them."""
    return Latencies(
        ttft_s=distribution(ttft(one) for one in exchanges),
        itl_s=distribution(gap for one in exchanges for gap in gaps(one)),
        tpot_s=distribution(value for one in exchanges if (value := tpot(one)) is not None),
        e2e_s=distribution(e2e(one) for one in exchanges),
    )


# ── Goodput ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that met every target."""

    slo_s: dict[str, float]
    """`ttft`, `tpot`, `e2e` → most seconds allowed."""
    met: int
    share: float
    """Of all requests, failed ones included."""
    requests_per_s: float


def parse_slo(text: str) -> dict[str, float]:
    """`ttft=200ms,tpot=30ms,e2e=5s` as seconds. Raises `WorkloadError` naming what is allowed."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        number = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|)", value.strip())
        if name not in SLO_NAMES:
            raise WorkloadError(
                f"--slo: '{name}' is no latency.{did_you_mean(name, SLO_NAMES)} Known: {', '.join(SLO_NAMES)}"
            )
        if number is None or float(number[1]) <= 0:
            raise WorkloadError(f"--slo: '{part.strip()}' is no target: write {name}=200ms or {name}=1.5s")
        found[name] = float(number[1]) * _UNITS[number[2]]
    return found


def meets(exchange: Exchange, slo_s: dict[str, float]) -> bool:
    """Whether a success kept every target; an answer of one token has no TPOT to miss."""
    values = {"ttft": ttft(exchange), "tpot": tpot(exchange), "e2e": e2e(exchange)}
    return all((value := values[name]) is None or value <= limit for name, limit in slo_s.items())


def goodput(exchanges: Sequence[Exchange], slo_s: dict[str, float], duration_s: float) -> Goodput:
    """Goodput of all `exchanges` of a run."""
    met = sum(one.error is None and meets(one, slo_s) for one in exchanges)
    return Goodput(slo_s=slo_s, met=met, share=met / len(exchanges), requests_per_s=met / duration_s)


# ── Counting, client, time line ─────────────────────────────────────────────────────────────────────────────────


class TokenCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How output tokens were counted, over the successes."""

    total_by: dict[str, int]
    """`usage`, `token_ids`, `logprobs` or `chunks` → requests whose number of tokens comes from it."""
    times_by: dict[str, int]
    """The same for the number of tokens in each chunk, on which ITL rests. `chunks`: unknown, taken as one each."""
    tokens_per_chunk: float
    """1: every token came by itself, and ITL is exact. Above that, `chunks` means times between chunks."""


def token_counts(exchanges: Sequence[Exchange]) -> TokenCounts:
    """How the tokens of successes were counted."""
    chunks = sum(len(one.chunk_times) for one in exchanges)
    return TokenCounts(
        total_by=dict(Counter("usage" if one.output_tokens is not None else str(one.counted_by) for one in exchanges)),
        times_by=dict(Counter(str(one.counted_by) for one in exchanges)),
        tokens_per_chunk=sum(one.num_tokens for one in exchanges) / chunks if chunks else 0.0,
    )


class ClientFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What this client itself did to the figures."""

    send_lag_s: Distribution
    """How much later than it could each request was sent: the client was busy."""
    room_wait_s: Distribution
    """How long each due request waited for room under the concurrency limit. No latency includes this."""
    cpu_share: float
    """Processor time by duration; near 1 the one core it uses is full, and latencies are partly its own."""


def client_figures(exchanges: Sequence[Exchange], cpu_s: float, duration_s: float) -> ClientFigures:
    """Figures over all requests; there is at least one."""
    lag = distribution(one.sent - one.ready for one in exchanges)
    wait = distribution(one.ready - one.due for one in exchanges)
    assert lag is not None and wait is not None
    return ClientFigures(send_lag_s=lag, room_wait_s=wait, cpu_share=cpu_s / duration_s)


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """A run in equal intervals."""

    bin_s: float
    arrivals: list[int]
    """Requests sent."""
    completions: list[int]
    """Requests that ended well."""
    errors: list[int]
    output_tokens: list[float]
    """Of all requests; an estimate where chunks do not say how many tokens they hold."""
    concurrency: list[float]
    """Requests under way, on average over the interval."""
    peak_concurrency: int

    @property
    def mean_concurrency(self) -> float:
        return sum(self.concurrency) / len(self.concurrency)


def timeline(exchanges: Sequence[Exchange], started: float, duration_s: float) -> Timeline:
    """Cut a run into at most `TIMELINE_BINS` intervals."""
    count = TIMELINE_BINS
    width = duration_s / count
    arrivals, completions, errors = [0] * count, [0] * count, [0] * count
    tokens, busy = [0.0] * count, [0.0] * count

    def bin_of(time: float) -> int:
        return min(count - 1, max(0, math.floor((time - started) / width)))

    for one in exchanges:
        first, last = bin_of(one.sent), bin_of(one.ended)
        arrivals[first] += 1
        (completions if one.error is None else errors)[last] += 1
        for place in range(first, last + 1):
            begin, end = started + place * width, started + (place + 1) * width
            busy[place] += max(0.0, min(end, one.ended) - max(begin, one.sent))
        seen = sum(one.chunk_tokens)
        for time, number in zip(one.chunk_times, one.chunk_tokens, strict=True):
            tokens[bin_of(time)] += number * one.num_tokens / seen
    return Timeline(
        bin_s=width,
        arrivals=arrivals,
        completions=completions,
        errors=errors,
        output_tokens=tokens,
        concurrency=[seconds / width for seconds in busy],
        peak_concurrency=_peak(exchanges),
    )


def _peak(exchanges: Sequence[Exchange]) -> int:
    # Ends before starts at the same moment: a request that takes another's place is not beside it.
    changes = sorted([(one.sent, 1) for one in exchanges] + [(one.ended, -1) for one in exchanges])
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak

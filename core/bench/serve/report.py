"""What `bench serve` says, as one object: `--json` writes it, `tables` and `plot` draw it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from interlace.bench.machine import Machine
from interlace.bench.metrics import Latencies
from interlace.bench.serve.client import Exchange
from interlace.bench.serve.load import LoadRun
from interlace.bench.serve.metrics import (
    ClientFigures,
    Goodput,
    Timeline,
    TokenCounts,
    client_figures,
    goodput,
    serve_latencies,
    timeline,
    token_counts,
)
from interlace.bench.serve.self_test import SelfTest
from interlace.bench.serve.target import Target

LARGE_LAG_S = 0.01
"""A p99 of the send lag above this earns a warning, as does a client that fills most of its core."""
LARGE_CPU_SHARE = 0.8


class ServeSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked, of whom, and when."""

    base_url: str
    endpoint: str
    model: str
    temperature: float
    ignore_eos: bool
    """Whether the server was told to give exactly the wanted number of tokens."""
    extra_body: dict[str, object]
    workload: str
    arrivals: str
    seed: int
    requests: int
    warmups: int
    """Requests sent before, which count nowhere."""
    max_concurrency: int | None
    timeout_s: float


class ServeReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `bench serve`. Times in seconds; rates count whole answers only."""

    benchmark: str = "serve"
    setup: ServeSetup
    duration_s: float
    """From the start to the end of the last request."""
    completed: int
    failed: int
    errors: dict[str, int]
    """Kind → requests that failed so."""
    error_messages: dict[str, str]
    """Kind → the first message of that kind."""
    off_length: int
    """Whole answers that are longer or shorter than was asked."""
    prompt_tokens: int | None
    """By the server's usage; None if it reports none."""
    cached_tokens: int | None
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float | None
    """Prompt and output tokens."""
    goodput: Goodput | None
    latencies: Latencies
    token_counts: TokenCounts
    client: ClientFigures
    self_test: SelfTest | None
    mean_concurrency: float
    peak_concurrency: int
    timeline: Timeline
    machine: Machine
    """Where the client ran."""


def setup_of(target: Target, **more: object) -> ServeSetup:
    """The facts of a run; `more` are those that the target does not know."""
    own = {name: getattr(target, name) for name in ServeSetup.__struct_fields__ if hasattr(target, name)}
    return ServeSetup(**own, **more)  # type: ignore[arg-type]


def make_report(
    setup: ServeSetup, run: LoadRun, slo_s: dict[str, float], self_test: SelfTest | None, machine: Machine
) -> ServeReport:
    """Sum up a run."""
    whole = [one for one in run.exchanges if one.error is None]
    failed = [one for one in run.exchanges if one.error is not None]
    duration = run.duration_s
    output = sum(one.num_tokens for one in whole)
    prompt = _sum(whole, "prompt_tokens")
    course = timeline(run.exchanges, run.started, duration)
    return ServeReport(
        setup=setup,
        duration_s=duration,
        completed=len(whole),
        failed=len(failed),
        errors=dict(Counter(str(one.error) for one in failed).most_common()),
        error_messages={str(one.error): one.message for one in reversed(failed)},
        off_length=sum(one.num_tokens != one.asked_tokens for one in whole),
        prompt_tokens=prompt,
        cached_tokens=_sum(whole, "cached_tokens"),
        output_tokens=output,
        requests_per_s=len(whole) / duration,
        output_tokens_per_s=output / duration,
        total_tokens_per_s=None if prompt is None else (prompt + output) / duration,
        goodput=goodput(run.exchanges, slo_s, duration) if slo_s else None,
        latencies=serve_latencies(whole),
        token_counts=token_counts(whole),
        client=client_figures(run.exchanges, run.cpu_s, duration),
        self_test=self_test,
        mean_concurrency=course.mean_concurrency,
        peak_concurrency=course.peak_concurrency,
        timeline=course,
        machine=machine,
    )


def _sum(exchanges: Sequence[Exchange], name: str) -> int | None:
    """Of a field that a server may leave out; None if it always did."""
    known = [getattr(one, name) for one in exchanges if getattr(one, name) is not None]
    return sum(known) if known else None


def warnings_of(report: ServeReport) -> list[str]:
    """What a reader must know before trusting the figures."""
    found = []
    lag, counts = report.client.send_lag_s, report.token_counts
    if lag.p99 > LARGE_LAG_S or report.client.cpu_share > LARGE_CPU_SHARE:
        found.append(
            f"this client was a bottleneck (send lag p99 {lag.p99 * 1e3:.1f} ms, {report.client.cpu_share:.0%} of a "
            "core): latencies are partly its own. Lower the load, or run it on another machine"
        )
    if report.failed:
        found.append(f"{report.failed} of {report.setup.requests} requests failed, and count in no rate or latency")
    if report.off_length and report.setup.ignore_eos:
        found.append(f"{report.off_length} answers have another length than asked: the server ignores `ignore_eos`")
    if counts.total_by.get("chunks"):
        found.append("the server reports no usage: each chunk with text was counted as one token")
    elif counts.tokens_per_chunk > 1.02 and counts.times_by.get("chunks"):
        found.append(
            f"the server packs {counts.tokens_per_chunk:.2f} tokens into a chunk: ITL is the time between chunks"
        )
    if report.machine.is_busy:
        found.append("the client's machine was busy with other work")
    return found

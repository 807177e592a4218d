"""A `bench serve` report as tables for people, and one line while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from interlace.bench.metrics import Distribution
from interlace.bench.serve.load import Watcher
from interlace.bench.serve.report import ServeReport, warnings_of
from interlace.bench.tables import facts_table, figures_table, open_console

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def print_serve_report(report: ServeReport, console: Console | None = None) -> None:
    """Draw the report on stdout, or on `console`; warnings come last."""
    console = console or open_console()
    for part in _parts(report):
        console.print(part, highlight=False)
    for text in warnings_of(report):
        console.print(f"warning: {text}", highlight=False, style="yellow", markup=False)


def _parts(report: ServeReport) -> Iterable[RenderableType]:
    yield facts_table("bench serve", _setup_rows(report))
    yield facts_table("throughput", _throughput_rows(report))
    yield _latency_table(report)
    yield facts_table("the client itself", _client_rows(report))


def _setup_rows(report: ServeReport) -> list[tuple[str, str]]:
    setup = report.setup
    limit = "no limit" if setup.max_concurrency is None else f"at most {setup.max_concurrency} at once"
    lengths = "exact lengths asked for" if setup.ignore_eos else "answers end where the model ends them"
    return [
        ("server", f"{setup.base_url}, {setup.endpoint}, model {setup.model}"),
        ("workload", f"{setup.requests} requests: {setup.workload}; seed {setup.seed}, {lengths}"),
        ("arrivals", f"{setup.arrivals}, {limit}; {setup.warmups} warm-up requests before"),
    ]


def _throughput_rows(report: ServeReport) -> list[tuple[str, str]]:
    errors = ", ".join(f"{count} {kind} ({report.error_messages[kind]})" for kind, count in report.errors.items())
    rows = [
        ("whole answers", f"{report.completed} of {report.setup.requests}, in {report.duration_s:.2f} s"),
        ("errors", errors or "none"),
        ("requests/s", f"{report.requests_per_s:,.2f}"),
        ("output tokens/s", f"{report.output_tokens_per_s:,.1f}  ({report.output_tokens:,} tokens)"),
    ]
    if report.total_tokens_per_s is not None:
        cached = "" if report.cached_tokens is None else f", {report.cached_tokens:,} from the prefix cache"
        rows.append(("total tokens/s", f"{report.total_tokens_per_s:,.1f}  ({report.prompt_tokens:,} in{cached})"))
    if report.goodput is not None:
        good = report.goodput
        limits = ", ".join(f"{name} ≤ {_time(limit)}" for name, limit in good.slo_s.items())
        rows.append(("goodput", f"{good.requests_per_s:,.2f} requests/s  ({good.share:.1%} met {limits})"))
    rows.append(("under way", f"{report.mean_concurrency:.1f} on average, {report.peak_concurrency} at most"))
    return rows


def _latency_table(report: ServeReport) -> RenderableType:
    rows: Sequence[tuple[str, Distribution | None]] = (
        ("TTFT", report.latencies.ttft_s),
        ("ITL", report.latencies.itl_s),
        ("TPOT", report.latencies.tpot_s),
        ("E2E", report.latencies.e2e_s),
    )
    table = figures_table("latency, ms", ("", "mean", "p50", "p90", "p99", "max"))
    for name, found in rows:
        values = ["-"] * 5
        if found is not None:
            figures = (found.mean, found.median, found.p90, found.p99, found.max)
            values = [f"{value * 1e3:,.1f}" for value in figures]
        table.add_row(name, *values)
    return table


def _client_rows(report: ServeReport) -> list[tuple[str, str]]:
    client, counts = report.client, report.token_counts
    totals = ", ".join(f"{how} ({number})" for how, number in counts.total_by.items()) or "-"
    rows = [
        ("send lag", _tails(client.send_lag_s)),
        ("wait for room", _tails(client.room_wait_s)),
        ("processor", f"{client.cpu_share:.0%} of a core"),
        ("tokens counted by", f"{totals}; {counts.tokens_per_chunk:.2f} tokens a chunk"),
    ]
    test = report.self_test
    if test is not None:
        rows += [
            ("self-test", f"{test.requests} requests like these against a server that does no work:"),
            ("  adds to a token", _tails(test.added_latency_s)),
            ("  send lag", _tails(test.send_lag_s)),
            ("  processor", f"{test.cpu_share:.0%} of a core"),
            ("  at most", f"{test.max_requests_per_s:,.0f} requests/s, {test.max_tokens_per_s:,.0f} tokens/s"),
        ]
    return rows


def _tails(found: Distribution) -> str:
    return f"p50 {_time(found.median)}, p99 {_time(found.p99)}, at most {_time(found.max)}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def status_line(watcher: Watcher, now: float) -> str:
    """How a run stands."""
    seconds = max(now - watcher.started, 1e-9)
    failed = f", {watcher.failed} failed" if watcher.failed else ""
    return (
        f"{watcher.done} of {watcher.total} done{failed}, {watcher.sent - watcher.done} under way, "
        f"{watcher.tokens:,} tokens, {watcher.tokens / seconds:,.0f} tokens/s, {seconds:.0f} s"
    )

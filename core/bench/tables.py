"""A report as tables for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from interlace.bench.metrics import Distribution, Spread
from interlace.bench.report import PluginCost, Report
from interlace.worker.memory import format_bytes

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

WIDTH = 100
"""Columns where the output is no terminal, so that no line is broken in a file."""

_STARTUP_PARTS = (
    ("python", "python_s"),
    ("config, tokenizer", "config_s"),
    ("imports", "import_s"),
    ("weights", "weights_s"),
    ("cache", "cache_s"),
    ("first token", "first_token_s"),
    ("total", "total_s"),
)


def open_console() -> Console:
    """Stdout, at a fixed width where it is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    return console


def print_report(report: Report, console: Console | None = None) -> None:
    """Draw the report on stdout, or on `console`."""
    console = console or open_console()
    for part in _parts(report):
        console.print(part, highlight=False)


def _parts(report: Report) -> Iterable[RenderableType]:
    yield facts_table(f"bench {report.benchmark}", _subject_rows(report))
    yield facts_table("throughput" + _of_runs(report), _throughput_rows(report))
    yield _latency_table(report)
    yield _startup_table(report)
    if report.plugin_cost is not None:
        yield _plugin_table(report, report.plugin_cost)


def _of_runs(report: Report) -> str:
    count = len(report.runs)
    return f" (median of {count} runs, range)" if count > 1 else " (one run)"


def _subject_rows(report: Report) -> list[tuple[str, str]]:
    engine, machine, work = report.engine, report.machine, report.workload
    chosen = [f"{kind} {', '.join(names)}" for kind, names in engine.selections.items()]
    load = "" if machine.load is None else f", load {machine.load:.1f}"
    return [
        ("model", f"{engine.model} ({engine.architecture}), {engine.dtype}, weights {engine.weights}"),
        ("plugins", "; ".join([f"scheduler {engine.scheduler}", *chosen, f"executor {engine.executor}"])),
        ("machine", f"{machine.cpu or 'unknown CPU'}, {machine.cores} cores{load}; {engine.threads} threads"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        ("workload", work.description),
        ("", f"{work.requests} requests, {work.prompt_tokens:,} tokens in, {work.output_tokens:,} out"),
    ]


def _throughput_rows(report: Report) -> list[tuple[str, str]]:
    lookups = f"{report.prefix_hits:,} of {report.prefix_queries:,} prompt tokens ({report.prefix_hit_rate:.0%})"
    return [
        ("output tokens/s", _range(report.output_tokens_per_s)),
        ("total tokens/s", _range(report.total_tokens_per_s)),
        ("requests/s", _range(report.requests_per_s, 2)),
        ("duration", _range(report.duration_s, 2, " s")),
        ("prefix-cache hits", lookups),
        ("steps, preemptions", f"{report.steps:,}, {report.preemptions:,}"),
        ("peak memory", format_bytes(report.peak_rss_bytes)),
    ]


def _latency_table(report: Report) -> RenderableType:
    table = figures_table("latency, ms", ("", "mean", "median", "p90", "p99", "max"))
    rows: list[tuple[str, Distribution | None]] = [
        ("TTFT", report.latencies.ttft_s),
        ("ITL", report.latencies.itl_s),
        ("TPOT", report.latencies.tpot_s),
        ("E2E", report.latencies.e2e_s),
        ("whole batch", report.batch_latency_s),
    ]
    for name, found in rows:
        if found is not None:
            values = (found.mean, found.median, found.p90, found.p99, found.max)
            table.add_row(name, *(f"{value * 1e3:,.1f}" for value in values))
    return table


def _startup_table(report: Report) -> RenderableType:
    table = figures_table("start, s", [name for name, _ in _STARTUP_PARTS])
    seconds = [getattr(report.startup, field) for _, field in _STARTUP_PARTS]
    table.add_row(*("-" if value is None else f"{value:.2f}" for value in seconds))
    return table


def _plugin_table(report: Report, costs: list[PluginCost]) -> RenderableType:
    table = figures_table(f"plugins, over {report.steps:,} steps", ("", "seconds", "µs a step", "share of the time"))
    for cost in costs:
        share, per_step = f"{cost.share:.2%}", f"{cost.seconds_per_step * 1e6:,.1f}"
        table.add_row(cost.plugin, f"{cost.seconds:,.3f}", per_step, share)
    return table


def _range(figure: Spread, digits: int = 1, unit: str = "") -> str:
    text = f"{figure.median:,.{digits}f}{unit}"
    return text if figure.min == figure.max else f"{text}  ({figure.min:,.{digits}f} to {figure.max:,.{digits}f})"


def facts_table(title: str, rows: Iterable[tuple[str, str]]) -> RenderableType:
    """Names and texts, without lines."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(min_width=20, style="cyan")
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    return Padding(table, (0, 0, 1, 0))


def figures_table(title: str, columns: Iterable[str]) -> Table:
    """An empty table of right-aligned figures; a first column without a name holds names."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 and not name else "right", no_wrap=True)
    return table

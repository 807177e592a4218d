"""A run as a picture: its course on the left, the distributions of its latencies on the right. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from interlace.bench.serve.client import Exchange
from interlace.bench.serve.metrics import e2e, gaps, tpot, ttft
from interlace.bench.serve.report import ServeReport
from interlace.errors import InterlaceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _RED, _GREY = "#2563eb", "#d97706", "#dc2626", "#9ca3af"


class PlotError(InterlaceError):
    """The picture cannot be drawn or written."""


def check_plot(path: Path) -> None:
    """Raise `PlotError` before a run whose picture could not be drawn after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError("--plot needs matplotlib. Install it with: pip install 'interlace[plot]'")
    if path.suffix.lower() != ".png":
        raise PlotError(f"--plot {path}: the picture is a PNG, so the file's name should end in .png")
    if not path.parent.is_dir():
        raise PlotError(f"--plot {path}: there is no folder {path.parent}")


def write_plot(path: Path, report: ServeReport, exchanges: Sequence[Exchange]) -> None:
    """Write the picture of a run. Raises `PlotError` if the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.add_gridspec(3, 2)
    course = [figure.add_subplot(grid[row, 0]) for row in range(3)]
    curves = [figure.add_subplot(grid[row, 1]) for row in range(3)]
    for axes in course[1:]:
        axes.sharex(course[0])
    _draw_course(course, report)
    whole = [one for one in exchanges if one.error is None]
    limits = report.goodput.slo_s if report.goodput is not None else {}
    _draw_cdf(curves[0], {"TTFT": [ttft(one) for one in whole]}, limits.get("ttft"))
    per_token = [value for one in whole if (value := tpot(one)) is not None]
    _draw_cdf(curves[1], {"TPOT": per_token, "ITL": [gap for one in whole for gap in gaps(one)]}, limits.get("tpot"))
    _draw_cdf(curves[2], {"E2E": [e2e(one) for one in whole]}, limits.get("e2e"))
    setup = report.setup
    figure.suptitle(
        f"{setup.model}: {setup.workload}; {setup.arrivals}\n{report.completed} whole answers, {report.failed} errors, "
        f"{report.requests_per_s:,.2f} requests/s, {report.output_tokens_per_s:,.1f} output tokens/s",
        fontsize=10,
    )
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise PlotError(f"{path} cannot be written: {error}") from error


def _draw_course(axes: Sequence[Axes], report: ServeReport) -> None:
    line = report.timeline
    times = [place * line.bin_s for place in range(len(line.arrivals))]

    def per_second(counts: Sequence[float]) -> list[float]:
        return [count / line.bin_s for count in counts]

    axes[0].step(times, per_second(line.arrivals), where="post", color=_BLUE, label="sent")
    axes[0].step(times, per_second(line.completions), where="post", color=_ORANGE, label="whole answers")
    if report.failed:
        axes[0].step(times, per_second(line.errors), where="post", color=_RED, label="errors")
    axes[0].set_ylabel("requests/s")
    axes[0].legend(fontsize=8)
    axes[1].fill_between(times, line.concurrency, step="post", color=_BLUE, alpha=0.3)
    axes[1].set_ylabel("requests under way")
    axes[2].step(times, per_second(line.output_tokens), where="post", color=_BLUE)
    axes[2].set_ylabel("output tokens/s")
    axes[2].set_xlabel("seconds")
    for one in axes:
        one.set_ylim(bottom=0)
        one.grid(alpha=0.3)


def _draw_cdf(axes: Axes, samples: dict[str, list[float]], limit_s: float | None) -> None:
    for (name, values), color in zip(samples.items(), (_BLUE, _ORANGE), strict=False):
        ordered = sorted(value * 1e3 for value in values)
        if ordered:
            shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
            axes.step(ordered, shares, where="post", color=color, label=name)
    if limit_s is not None:
        axes.axvline(limit_s * 1e3, color=_GREY, linestyle="--", label="target")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(f"{' and '.join(samples)}, ms")
    axes.set_ylabel("share of values")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="lower right")

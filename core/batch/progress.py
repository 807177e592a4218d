"""How a batch stands, on stderr: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import asyncio
import sys

from interlace.batch.runner import BatchProgress
from interlace.clock import Clock

TERMINAL_INTERVAL_S = 0.5
PLAIN_INTERVAL_S = 60.0


def describe(progress: BatchProgress, elapsed_s: float) -> str:
    """Lines, failures, output tokens per second and time to go."""
    failed = f" ({progress.failed} failed)" if progress.failed else ""
    rate = progress.output_tokens / elapsed_s if elapsed_s > 0 else 0.0
    left = progress.eta_s(elapsed_s)
    to_go = "" if left is None or progress.done >= progress.total else f", {_duration(left)} to go"
    return f"{progress.done:,} of {progress.total:,} lines{failed}, {rate:,.0f} tokens/s{to_go}"


async def show_progress(progress: BatchProgress, clock: Clock) -> None:
    """Show it until cancelled."""
    begin = clock.now()
    if not sys.stderr.isatty():
        while True:
            await asyncio.sleep(PLAIN_INTERVAL_S)
            print(describe(progress, clock.now() - begin), file=sys.stderr, flush=True)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    with Progress(BarColumn(), TextColumn("{task.description}"), console=console, auto_refresh=False) as bar:
        task = bar.add_task("", total=progress.total)
        while True:
            bar.update(task, completed=progress.done, description=describe(progress, clock.now() - begin))
            bar.refresh()
            await asyncio.sleep(TERMINAL_INTERVAL_S)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"

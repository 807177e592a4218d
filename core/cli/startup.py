"""What a command says once its engine runs."""

from __future__ import annotations

import sys

from interlace.engine.front import Front


def print_startup(front: Front) -> None:
    """What was chosen and how long the start took, on a terminal's stderr."""
    if not sys.stderr.isatty():
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for subject, text in front.report():
        grid.add_row(Text(subject, style="cyan"), Text(text, style="dim"))
    Console(stderr=True).print(grid)

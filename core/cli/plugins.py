"""`interlace plugins`: what is installed, and what the settings make of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from interlace.cli.tables import print_table
from interlace.config import LoadedSettings
from interlace.contracts import CONTRACTS
from interlace.plugin_manager import PluginManager
from interlace.registry import Offer

COLUMNS = ("kind", "name", "state", "package", "version", "contract", "summary")


def add_parser(subparsers: Any) -> None:
    """Declare `plugins list`; plain `plugins` is the same."""
    parser = subparsers.add_parser(
        "plugins",
        help="list plugins: what is installed, selected, blocked or broken",
        description="List plugins. States: selected (named in the settings), auto (a candidate where the settings say "
        "auto), available, blocked (never imported) and broken (failed to load).",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    listing = actions.add_parser("list", help="list plugins (the default)")
    listing.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print a JSON array")


def run(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    """Print the list."""
    rows = list(list_plugins(loaded, PluginManager(loaded.settings)))
    if args.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
    else:
        print_table(COLUMNS, ([row[column] for column in COLUMNS] for row in rows))
    return 0


def list_plugins(loaded: LoadedSettings, plugins: PluginManager) -> Iterator[dict[str, str]]:
    """One row per provider, then one per plugin that is blocked or broken."""
    for kind in CONTRACTS:
        for offer in sorted(plugins.registry(kind), key=lambda offer: offer.name):
            yield {
                "kind": kind,
                "name": offer.name,
                "state": _state(loaded, offer),
                "package": offer.origin.package,
                "version": offer.origin.version,
                "contract": offer.provider.api,
                "summary": offer.provider.summary,
            }
    stuck = [(origin, "blocked", "kept out by plugins.allow or plugins.block") for origin in plugins.blocked]
    stuck += [
        (failure.origin, "broken", f"{type(failure.error).__name__}: {failure.error}") for failure in plugins.failures
    ]
    for origin, state, summary in stuck:
        yield {
            "kind": "?",
            "name": origin.entry_point,
            "state": state,
            "package": origin.package,
            "version": origin.version,
            "contract": "?",
            "summary": summary,
        }


def _state(loaded: LoadedSettings, offer: Offer) -> str:
    if not CONTRACTS[offer.kind].section:
        return "available"
    section = getattr(loaded.settings, CONTRACTS[offer.kind].section)
    names = {offer.name, offer.qualified}
    selected = section.use if isinstance(section.use, list) else [section.use]
    if names.intersection(selected):
        return "selected"
    if "auto" in selected and names.intersection(getattr(section, "auto_order", names)):
        return "auto"
    return "available"

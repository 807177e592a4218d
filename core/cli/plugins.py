"""`interlace plugins`: what is installed, what the settings make of it, what is wrong with it, and how to write one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from interlace.cli.tables import print_table
from interlace.config import LoadedSettings
from interlace.contracts import CONTRACTS
from interlace.errors import PluginError
from interlace.plugin_manager import PluginManager
from interlace.registry import Offer, Registry

COLUMNS = ("kind", "name", "state", "package", "version", "contract", "summary")

STATES = (
    "States: selected (named in the settings), auto (a candidate where the settings say auto), available, blocked "
    "(never imported) and broken (cannot be used; the summary says why)."
)


def add_parser(subparsers: Any) -> None:
    """Declare the actions of `plugins`; plain `plugins` is `plugins list`."""
    parser = subparsers.add_parser(
        "plugins", help="list, show, check and create plugins", description=f"List plugins. {STATES}"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    listing = actions.add_parser("list", help="list plugins (the default)", description=f"List plugins. {STATES}")
    _add_json(listing)
    show = actions.add_parser(
        "show",
        help="everything about one plugin: options, contract, origin",
        description="Show options, contract, origin and processes of one plugin, and how to select it.",
    )
    show.add_argument("name", metavar="NAME", help="name, or kind:name or package:name where the name is ambiguous")
    _add_json(show)
    doctor = actions.add_parser(
        "doctor",
        help="load every installed plugin in a process of its own and say what is wrong",
        description="Load every installed entry point in a process of its own, check all it offers against the "
        "contracts, and look for conflicts and unmet requirements. Exit code 1 if something is wrong.",
    )
    doctor.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="given to each step of each plugin (60)"
    )
    _add_json(doctor)
    new = actions.add_parser(
        "new",
        help="write a new plugin package: it installs, works and passes its conformance test",
        description=f"Write a complete package with a working plugin. Kinds: {', '.join(CONTRACTS)}.",
    )
    new.add_argument("kind", metavar="KIND", help="what to write, e.g. schedulers")
    new.add_argument(
        "name", metavar="NAME", help="what the configuration will select; of a model, its architecture string"
    )
    new.add_argument("--directory", metavar="D", help="folder of the new package (default: interlace-NAME)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a time")
    return seconds


def run(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    """Do one action. What only one of them needs is imported for it alone."""
    if args.action == "doctor":
        from interlace.cli.plugins_doctor import run_doctor

        return run_doctor(loaded, timeout=args.timeout, as_json=args.json)
    if args.action == "show":
        from interlace.cli.plugins_show import run_show

        return run_show(loaded, args.name, as_json=args.json)
    if args.action == "new":
        from interlace.cli.plugins_new import run_new

        return run_new(loaded, args.kind, args.name, args.directory)
    return _run_list(loaded, as_json=args.json)


def _run_list(loaded: LoadedSettings, *, as_json: bool) -> int:
    rows = list(list_plugins(loaded, discover(loaded)))
    if as_json:
        json.dump(rows, sys.stdout, indent=2)
        print()
    else:
        print_table(COLUMNS, ([row[column] for column in COLUMNS] for row in rows))
    return 0


def discover(loaded: LoadedSettings) -> PluginManager:
    """The plugins, with unmet requirements as warnings: who asks what is installed should get an answer."""
    plugins = PluginManager(loaded.settings, enforce=False)
    for error in plugins.unmet_requirements():
        print(f"interlace: WARNING: no engine will start: {error}", file=sys.stderr)
    return plugins


def list_plugins(loaded: LoadedSettings, plugins: PluginManager) -> Iterator[dict[str, str]]:
    """One row per provider, then one per plugin that is blocked or broken. Imports no provider's class."""
    for kind in CONTRACTS:
        registry = plugins.registry(kind)
        for offer in sorted(registry, key=lambda offer: (offer.name, offer.origin.package)):
            state, problem = offer_state(loaded, registry, offer)
            yield {
                "kind": kind,
                "name": offer.name,
                "state": state,
                "package": offer.origin.package,
                "version": offer.origin.version,
                "contract": offer.provider.api or "none",
                "summary": problem or offer.provider.summary,
            }
    stuck = [(origin, "blocked", "kept out by plugins.allow or plugins.block") for origin in plugins.blocked]
    stuck += [(failure.origin, "broken", failure.reason) for failure in plugins.failures]
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


def offer_state(loaded: LoadedSettings, registry: Registry, offer: Offer) -> tuple[str, str]:
    """(state, what is wrong with it if it is broken), as far as that shows without importing it."""
    try:
        offer.component().check_version()
        state, name = _selection(loaded, offer)
        if state == "selected":
            registry.get(name)
    except PluginError as error:
        return "broken", str(error)
    return state, ""


def _selection(loaded: LoadedSettings, offer: Offer) -> tuple[str, str]:
    """(state by the settings, the name by which they select it)."""
    section = getattr(loaded.settings, CONTRACTS[offer.kind].section, None)
    use = getattr(section, "use", None)
    if use is None:  # chosen by something else: the checkpoint's architecture, or another plugin's options
        return "available", offer.name
    selected = use if isinstance(use, list) else [use]
    for name in (offer.qualified, offer.name):
        if name in selected:
            return "selected", name
    names = {offer.name, offer.qualified}
    if "auto" in selected and names.intersection(getattr(section, "auto_order", names)):
        return "auto", offer.name
    return "available", offer.name

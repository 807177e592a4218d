"""`interlace config`: the effective settings and their sources; `config explain KEY`; `config plan`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from interlace.cli.tables import print_table
from interlace.config import LoadedSettings, Setting, all_settings, describe, effective, nearest_key, plain_text
from interlace.contracts import CONTRACTS
from interlace.errors import ConfigError
from interlace.options import validate_options
from interlace.plugin_manager import PluginManager
from interlace.resolve import select_components


def add_parser(subparsers: Any) -> None:
    """Declare `config`, `config explain KEY` and `config plan`."""
    parser = subparsers.add_parser("config", help="show, explain and check the configuration", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    explain = actions.add_parser("explain", help="what a key means, what it may be, and its value here")
    explain.add_argument("key", metavar="KEY", help="dotted path, e.g. scheduler.options.priority.aging_s")
    plan = actions.add_parser("plan", help="components chosen and why, KV blocks and memory, before anything is loaded")
    plan.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def run(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    """Run the action; without one, print the effective settings."""
    if args.action == "plan":
        from interlace.cli.plan import print_plan

        return print_plan(loaded, args.json)
    if args.action == "explain":
        print("\n".join(explain(args.key, loaded)))
        return 0
    if args.json:
        json.dump({"settings": effective(loaded), "sources": loaded.sources}, sys.stdout, indent=2)
        print()
    else:
        rows = ((key, plain_text(_value(loaded, key)), source) for key, source in loaded.sources.items())
        print_table(("key", "value", "source"), rows)
    check_plugins(loaded)
    return 0


def check_plugins(loaded: LoadedSettings) -> None:
    """Raise what is wrong with the plugins that the settings select, and with the options given."""
    select_components(loaded, PluginManager(loaded.settings))


def explain(key: str, loaded: LoadedSettings) -> Iterator[str]:
    """Lines about one setting, one table, or one option of a plugin. Raises `ConfigError` for an unknown key."""
    settings = {setting.key: setting for setting in all_settings()}
    if ".options." in key:
        yield from _explain_option(key, loaded)
    elif key in settings:
        yield from _lines(settings[key], plain_text(_value(loaded, key)), loaded.source(key))
    elif any(known.startswith(f"{key}.") for known in settings):
        yield f"[{key}]"
        for setting in settings.values():
            if setting.key.startswith(f"{key}."):
                yield f"  {setting.key} = {plain_text(_value(loaded, setting.key))}: {setting.description}"
    else:
        raise _unknown(key, list(settings))


def _explain_option(key: str, loaded: LoadedSettings) -> Iterator[str]:
    section, _, path = key.partition(".options.")
    kind = next((contract.kind for contract in CONTRACTS.values() if contract.section == section), None)
    if kind is None:
        raise _unknown(section, [contract.section for contract in CONTRACTS.values()])
    name, _, option = path.partition(".")
    offer = PluginManager(loaded.settings).registry(kind).get(name, key)
    prefix = f"{section}.options.{name}."
    options = {setting.key: setting for setting in describe(offer.options_model(), prefix)}
    values = validate_options(loaded, offer, name)
    if not option:
        yield f"[{key}]: {offer.provider.summary or offer.component().owner}"
        yield from (f"  {setting.key}: {setting.type}; {setting.description}" for setting in options.values())
        return
    if key not in options:
        raise _unknown(key, list(options))
    value: Any = values
    for part in option.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    shown = options[key].default if value is None else plain_text(value)
    yield from _lines(options[key], "***" if options[key].type == "secret" else shown, loaded.source(key))


def _lines(setting: Setting, value: str, source: str) -> Iterator[str]:
    yield setting.key
    yield f"  {setting.description or 'No description.'}"
    yield f"  type:        {setting.type}"
    yield f"  default:     {setting.default}"
    yield f"  here:        {value} ({source})"
    yield f"  flag:        --{setting.key}"
    yield f"  environment: {setting.variable}"


def _unknown(key: str, known: list[str]) -> ConfigError:
    found = nearest_key(key, known)
    hint = f"Did you mean '{found}'?" if found else f"Known: {', '.join(known) or 'none'}"
    return ConfigError(f"there is no setting '{key}'. {hint}")


def _value(loaded: LoadedSettings, key: str) -> Any:
    value: Any = effective(loaded)
    for part in key.split("."):
        value = value[part]
    return value

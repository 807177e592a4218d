"""`interlace plugins show NAME`: one plugin's options, contract and origin, where it runs, and how to select it."""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from interlace.cli.plugins import discover, offer_state
from interlace.cli.tables import print_table
from interlace.config import LoadedSettings, Setting, describe
from interlace.contracts import CONTRACTS
from interlace.errors import PluginConflictError, PluginError, PluginNotFoundError, did_you_mean
from interlace.plugin_manager import PluginManager
from interlace.registry import Offer


class OptionRow(msgspec.Struct, frozen=True):
    """One option, by its full key."""

    key: str
    type: str
    default: str
    description: str


class Card(msgspec.Struct):
    """Everything about one provider, as `--json` prints it."""

    kind: str
    name: str
    summary: str
    state: str
    package: str
    version: str
    entry_point: str
    target: str
    contract: str
    """Version the provider is written for."""
    core_contract: str
    """Version this Interlace speaks."""
    interface: str
    processes: list[str]
    select: str
    options: list[OptionRow] = []
    arguments: list[OptionRow] = []
    """Of logits processors: what one request may say."""
    options_from: str = ""
    """The module the options were read from."""
    loaded_torch: bool = False
    """Whether reading them imported torch."""
    problem: str = ""
    """Why it cannot be used, if so."""


def run_show(loaded: LoadedSettings, name: str, *, as_json: bool) -> int:
    """Print the card of one provider; 1 if it is broken."""
    plugins = discover(loaded)
    card = make_card(loaded, plugins, find_offer(plugins, name))
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(card), indent=2).decode() + "\n")
    else:
        _print(card)
    return 1 if card.problem else 0


def find_offer(plugins: PluginManager, wanted: str) -> Offer:
    """The offer that `wanted` names: `name`, `kind:name`, `package:name` or `kind:package:name`.

    Raises `PluginNotFoundError`, or `PluginConflictError` with the names to choose from."""
    offers = [offer for kind in CONTRACTS for offer in plugins.registry(kind)]
    found = [offer for offer in offers if wanted in _names(offer)]
    if len(found) == 1:
        return found[0]
    if found:
        # The shortest name that only this one has; two entry points of one package leave nothing to tell apart.
        taken = [name for offer in offers for name in _names(offer)]
        choices = [next((n for n in _names(offer) if taken.count(n) == 1), _names(offer)[-1]) for offer in found]
        packages = ", ".join(f"{choice} ({offer.origin.label})" for choice, offer in zip(choices, found, strict=True))
        raise PluginConflictError(f"'{wanted}' names {len(found)} plugins; say which: {packages}")
    for failure in plugins.failures:
        if wanted in (failure.origin.package, failure.origin.entry_point):
            raise PluginNotFoundError(
                f"plugin {failure} failed to load, so what it offers is unknown. More: interlace plugins doctor"
            ) from failure.error
    known = sorted({offer.name for offer in offers})
    broken = f" Plugins that failed to load: {'; '.join(map(str, plugins.failures))}." if plugins.failures else ""
    raise PluginNotFoundError(
        f"no plugin is called '{wanted}'.{did_you_mean(wanted, known)} Installed: {', '.join(known)}.{broken}"
    )


def _names(offer: Offer) -> tuple[str, ...]:
    return (offer.name, f"{offer.kind}:{offer.name}", offer.qualified, f"{offer.kind}:{offer.qualified}")


def make_card(loaded: LoadedSettings, plugins: PluginManager, offer: Offer) -> Card:
    """Read the options in the lightest way there is, and say which one that was."""
    contract = CONTRACTS[offer.kind]
    registry = plugins.registry(offer.kind)
    state, problem = offer_state(loaded, registry, offer)
    card = Card(
        kind=offer.kind,
        name=offer.name,
        summary=offer.provider.summary,
        state=state,
        package=offer.origin.package,
        version=offer.origin.version,
        entry_point=offer.origin.entry_point,
        target=offer.provider.target,
        contract=offer.provider.api,
        core_contract=contract.version,
        interface=contract.base,
        processes=list(contract.processes),
        select=_how_to_select(offer, is_ambiguous=sum(other.name == offer.name for other in registry) > 1),
        problem=problem,
    )
    try:
        _read_options(card, offer)
    except PluginError as error:
        card.problem = card.problem or str(error)
        card.state = "broken"
    return card


def _read_options(card: Card, offer: Offer) -> None:
    contract = CONTRACTS[offer.kind]
    had_torch = "torch" in sys.modules
    if contract.section:
        model = offer.options_model()
        card.options = [_row(setting) for setting in describe(model, f"{contract.section}.options.{offer.name}.")]
        card.options_from = offer.provider.options or offer.provider.target
    if offer.kind == "logits_processors":
        card.arguments = [_row(setting) for setting in describe(offer.load().Args)]
    card.loaded_torch = not had_torch and "torch" in sys.modules


def _row(setting: Setting) -> OptionRow:
    return OptionRow(setting.key, setting.type, setting.default, setting.description)


def _how_to_select(offer: Offer, *, is_ambiguous: bool) -> str:
    """What to write where. Where two packages offer the name, only the qualified one selects it."""
    name = offer.qualified if is_ambiguous else offer.name
    section = CONTRACTS[offer.kind].section
    if offer.kind == "models":
        return f"by itself, for checkpoints whose architecture is {offer.name}"
    if offer.kind == "orderings":
        return f'scheduler.use = "ordered", scheduler.options.ordered.order = ["{name}", …]'
    if offer.kind == "logits_processors":
        return f'{section}.use = ["{name}"], then per request: logits_processors={{"{name}": {{…}}}}'
    if offer.kind == "checkpoints":
        return f'by itself where it recognises the files, or {section}.use = "{name}"'
    if offer.kind in ("attention", "kernels"):
        return f'{section}.use = "{name}", or a place in {section}.auto_order'
    return f'{section}.use = "{name}"'


# ── Output ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _print(card: Card) -> None:
    facts: dict[str, Any] = {
        "state": f"{card.state}: {card.problem}" if card.problem else card.state,
        "contract": f"version {card.contract or 'not stated'}, {card.interface} (this Interlace speaks "
        f"{card.core_contract})",
        "package": f"{card.package} {card.version}, entry point '{card.entry_point}'",
        "target": card.target,
        "loaded in": ", ".join(card.processes),
        "select": card.select,
    }
    print(f"{card.kind}:{card.name}" + (f"  {card.summary}" if card.summary else ""))
    for subject, text in facts.items():
        print(f"  {subject:<10}{text}")
    for title, rows in (("options", card.options), ("arguments of a request", card.arguments)):
        if rows:
            print(f"\n{title}:")
            print_table(("key", "type", "default", "description"), [msgspec.structs.astuple(row) for row in rows])
    if not card.options and card.options_from:
        print("\nno options")
    if card.loaded_torch:
        print(
            f"\nReading this imported torch. With Provider(options='package.module:Model') '{card.package}' could name "
            "a light one."
        )

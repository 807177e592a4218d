"""Plugin options: find the selected plugin's Options model and validate the configured values against it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails

from interlace.config import LoadedSettings, convert_texts, describe
from interlace.contracts import CONTRACTS
from interlace.errors import PluginContractError, PluginImportError, PluginOptionsError, did_you_mean, nearest
from interlace.registry import Offer, Registry


def check_options(loaded: LoadedSettings, registry: Registry) -> None:
    """Raise `PluginOptionsError` for options of a name that no plugin has, or that their plugin does not know.

    Options of plugins that are not selected are checked too where that is light: a slip in them would otherwise
    wait until somebody selects the plugin."""
    section = CONTRACTS[registry.kind].section
    for name in getattr(loaded.settings, section).options:
        if name not in registry:
            key = f"{section}.options.{name}"
            raise PluginOptionsError(
                f"{key} ({loaded.source(key)}): no {CONTRACTS[registry.kind].noun} is called '{name}'."
                f"{did_you_mean(name, registry.names())} Installed {registry.kind}: "
                f"{', '.join(registry.names()) or 'none'}. Take the options out, or install the package that has it."
            )
        for offer in registry:
            light = CONTRACTS[offer.kind].light or offer.provider.options
            if light and name in (offer.name, offer.qualified):
                with contextlib.suppress(PluginImportError, PluginContractError):  # loud only once it is selected
                    validate_options(loaded, offer, name)


def validate_options(loaded: LoadedSettings, offer: Offer, given_name: str | None = None) -> dict[str, Any]:
    """The options of `offer` as plain data, complete with defaults.

    `given_name` is the name the configuration used (it may be the qualified one). The options model is imported only
    where that is light or where there is something to validate; else the plugin itself applies its defaults.
    Raises `PluginOptionsError` naming the key, its source, pydantic's reason and the nearest option.
    """
    contract = CONTRACTS[offer.kind]
    if not contract.section:
        return {}
    options: Mapping[str, Mapping[str, Any]] = getattr(loaded.settings, contract.section).options
    prefix = options_table(loaded, offer, given_name)
    given = options.get(prefix.partition(".options.")[2], {})
    if not given and not contract.light and not offer.provider.options:
        return {}
    model = offer.options_model()
    values = convert_texts(given, model)
    try:
        validated = model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(details, prefix, model, offer, loaded) for details in error.errors()]
        raise PluginOptionsError("\n".join(lines)) from None  # the cause may hold secrets
    options_data: dict[str, Any] = msgspec.to_builtins(validated.model_dump(), enc_hook=_as_text)
    return options_data


def options_table(loaded: LoadedSettings, offer: Offer, given_name: str | None = None) -> str:
    """The table that holds the options of `offer`: under the name it was selected by, its qualified or plain name."""
    section = CONTRACTS[offer.kind].section
    options = getattr(loaded.settings, section).options
    name = next((name for name in (given_name, offer.qualified, offer.name) if name in options), offer.name)
    return f"{section}.options.{name}"


def _as_text(value: Any) -> str:
    """Paths and the like; secrets are revealed, for the plugin needs them."""
    return str(value.get_secret_value() if isinstance(value, SecretStr) else value)


def _explain(details: ErrorDetails, prefix: str, model: type[BaseModel], offer: Offer, loaded: LoadedSettings) -> str:
    path = ".".join(str(part) for part in details["loc"])
    key = f"{prefix}.{path}" if path else prefix
    owner = offer.component().owner
    known = {setting.key: setting for setting in describe(model)}
    where = f"{key} ({loaded.source(key)})"
    if details["type"] == "extra_forbidden":
        found = nearest(path, known)
        suggestion = f" Did you mean '{prefix}.{found}'?" if found else ""
        return f"{where}: unknown option of {owner}.{suggestion} Options: {', '.join(known) or 'none'}."
    reason = details["msg"].removeprefix("Value error, ")
    allowed = f" Allowed: {known[path].type}." if path in known else ""
    given = "" if details["type"] == "missing" or _holds_secret(model, path) else f" = {str(details['input'])!r}"
    return f"{key}{given} ({loaded.source(key)}): {reason[0].lower()}{reason[1:]}, says {owner}.{allowed}"


def _holds_secret(model: type[BaseModel], path: str) -> bool:
    first = path.partition(".")[0]
    return first in model.model_fields and "Secret" in str(model.model_fields[first].annotation)

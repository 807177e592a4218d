"""`load_settings`: merge the sources, validate once, and say of each value where it came from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from interlace.config.reference import all_settings, nearest_key, plain_text, section_model, setting_fields, variable_of
from interlace.config.settings import Settings
from interlace.config.sources import (
    KeyPath,
    Layer,
    Leaf,
    cli_layer,
    constructor_layer,
    environment_layer,
    file_layer,
    merge,
    nest,
)
from interlace.errors import ConfigError

DEFAULT = "default"


class LoadedSettings(NamedTuple):
    """Settings, and the source of each."""

    settings: Settings
    sources: dict[str, str]
    """Dotted key → `constructor`, `command line`, `environment NAME`, `file NAME` or `default`."""

    def source(self, key: str) -> str:
        """Where the value of `key` came from; for a table, the source of something in it."""
        if key in self.sources:
            return self.sources[key]
        return next((source for known, source in self.sources.items() if known.startswith(key + ".")), DEFAULT)


def environment() -> Mapping[str, str]:
    """The environment of this process: the one place where Interlace reads it."""
    return os.environ  # noqa: TID251


def debug_requested(variables: Mapping[str, str]) -> bool:
    """Whether commands should print tracebacks."""
    return variables.get("INTERLACE_DEBUG", "0") not in ("", "0")


def load_settings(
    constructor: Mapping[str, Any] | None = None,
    cli: Mapping[str, str] | None = None,
    config_file: str | Path | None = None,
    env: Mapping[str, str] | None = None,
) -> LoadedSettings:
    """Settings from, strongest first: `constructor` (nested dicts or dotted keys), `cli` (dotted key → text),
    environment variables, `config_file` (else the file `INTERLACE_CONFIG` names), defaults.

    `env` defaults to the environment of this process. Plugin options are merged here and validated when their plugin
    is selected. Raises `ConfigError` naming key, source, what is allowed and the nearest match.
    """
    variables = environment() if env is None else env
    file = config_file or variables.get("INTERLACE_CONFIG")
    layers = [
        file_layer(file) if file else {},
        environment_layer(variables),
        cli_layer(cli or {}),
        constructor_layer(constructor or {}),
    ]
    merged = merge(layers)
    try:
        settings = Settings(**nest(merged))
    except ValidationError as error:
        # Not chained: pydantic's error carries the input, and the input may hold API keys.
        raise ConfigError("\n".join(_explain(details, merged) for details in error.errors())) from None
    sources = {key: DEFAULT for key, _ in setting_fields() if not key.endswith(".options")}
    sources.update({".".join(path): leaf.source for path, leaf in merged.items()})
    return LoadedSettings(settings, sources)


def _explain(details: ErrorDetails, merged: Layer) -> str:
    """One line for one of pydantic's complaints."""
    location = tuple(str(part) for part in details["loc"])
    path, leaf = _culprit(location, merged)
    key = ".".join(path)
    if details["type"] == "extra_forbidden":
        return f"unknown setting '{key}' ({leaf.source}).{_suggest(key, leaf.source)} {_neighbours(location)}"
    key = ".".join(path[: len(location)])
    if details["type"] in ("model_type", "model_attributes_type", "dict_type"):
        given = plain_text(leaf.value) if _is_public(key) else "***"
        return f"'{key}' ({leaf.source}) is a table and cannot be {given!r}. {_neighbours((*location, ''))}".rstrip()
    reason = details["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    given = plain_text(leaf.value) if _is_public(key) else "***"
    allowed = next((setting.type for setting in all_settings() if setting.key == key), "")
    return f"{key} = {given!r} ({leaf.source}): {reason}." + (f" Allowed: {allowed}." if allowed else "")


def _is_public(key: str) -> bool:
    """False for secrets, and for anything unknown near them."""
    return "api_key" not in key


def _culprit(location: KeyPath, merged: Layer) -> tuple[KeyPath, Leaf]:
    """The leaf that `location` is about: it, the first below it, or the one that holds it (an item of a list)."""
    for path, leaf in merged.items():
        if path[: len(location)] == location:
            return path, leaf
    for end in range(len(location) - 1, 0, -1):
        if location[:end] in merged:
            return location[:end], merged[location[:end]]
    return location, Leaf("", DEFAULT)


def _suggest(key: str, source: str) -> str:
    keys = [key for key, _ in setting_fields()]
    if source.startswith("environment "):
        # Compared as variables: the usual slip is one underscore where two belong.
        variables = {variable_of(known): known for known in keys}
        found = nearest_key(source.removeprefix("environment "), list(variables))
        return f" Did you mean {found}?" if found else ""
    found = nearest_key(key, keys)
    return f" Did you mean '{found}'?" if found else ""


def _neighbours(location: KeyPath) -> str:
    """What may stand where `location` points."""
    model: type[BaseModel] | None = Settings
    for name in location[:-1]:
        field = model.model_fields.get(name) if model else None
        model = section_model(field.annotation) if field else None
    if model is None:
        return ""
    table = ".".join(location[:-1])
    return f"{f'[{table}]' if table else 'The top level'} has: {', '.join(model.model_fields)}."


def effective(loaded: LoadedSettings) -> dict[str, Any]:
    """All values as nested plain data, secrets masked: for printing and for `on_engine_start`."""
    return {name: _plain(getattr(loaded.settings, name)) for name in Settings.model_fields}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value if _is_plain(value) else plain_text(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))

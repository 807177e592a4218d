"""Where settings come from: constructor, flags, environment, file. Each source becomes leaves with their origin."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from interlace.config.reference import ENV_DELIMITER, ENV_PREFIX, section_model
from interlace.config.settings import Settings
from interlace.errors import ConfigError

KeyPath = tuple[str, ...]

OTHER_VARIABLES: Mapping[str, str] = {
    "INTERLACE_CONFIG": "Configuration file (TOML or YAML) read when no `--config` is given.",
    "INTERLACE_DEBUG": "If set and not 0: commands print a full traceback instead of one message.",
}
"""Variables with the prefix that are not settings."""


class Leaf(NamedTuple):
    """One value and where it came from (`file engine.toml`, `environment INTERLACE_SEED`, `command line`)."""

    value: Any
    source: str


Layer = dict[KeyPath, Leaf]
"""One source, flattened: path → leaf."""


class Text(str):
    """A value that came as text, from a flag or a variable, and takes the type of its key later."""


def constructor_layer(values: Mapping[str, Any]) -> Layer:
    """Keyword arguments: nested dicts, and dotted keys where that is handier."""
    return _flatten(values, "constructor")


def cli_layer(flags: Mapping[str, str]) -> Layer:
    """Flags by dotted path, without the leading dashes."""
    return _merge_texts({tuple(key.split(".")): Leaf(Text(text), "command line") for key, text in flags.items()})


def environment_layer(environment: Mapping[str, str]) -> Layer:
    """Variables with the prefix; an empty value counts as unset."""
    found: Layer = {}
    for variable in sorted(environment):
        if variable.startswith(ENV_PREFIX) and variable not in OTHER_VARIABLES and environment[variable]:
            path = tuple(variable.removeprefix(ENV_PREFIX).lower().split(ENV_DELIMITER))
            found[path] = Leaf(Text(environment[variable]), f"environment {variable}")
    return _merge_texts(found)


def file_layer(path: str | Path) -> Layer:
    """A TOML or YAML file, by its suffix. Raises `ConfigError` naming file and line when it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"configuration file '{path}' does not exist")
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigError(f"configuration file '{path}' should end in .toml, .yaml or .yml")
    return _flatten(_read_file(path), f"file {path.name}")


def _read_file(path: Path) -> dict[str, Any]:
    """The file's table, by pydantic-settings: imported for a file only, since it takes longer than all the rest."""
    import tomllib

    import yaml
    from pydantic_settings import BaseSettings, TomlConfigSettingsSource, YamlConfigSettingsSource

    reader: Any = TomlConfigSettingsSource if path.suffix == ".toml" else YamlConfigSettingsSource
    try:
        values: dict[str, Any] = reader(BaseSettings, path)()
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration file '{path}' is not valid TOML: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (at line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"configuration file '{path}' is not valid YAML: {error.problem}{where}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration file '{path}' cannot be read: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"configuration file '{path}' should hold a table of settings at its top") from error
    return values


def merge(layers: list[Layer]) -> Layer:
    """All layers, weakest first, into one: tables merge key by key, anything else is replaced."""
    merged: Layer = {}
    for layer in layers:
        for path, leaf in layer.items():
            # A plain value replaces a whole table and the other way round, so that the stronger source is judged.
            for other in [key for key in merged if _covers(path, key) or _covers(key, path)]:
                del merged[other]
            merged[path] = leaf
    return merged


def nest(layer: Layer) -> dict[str, Any]:
    """Leaves as nested dicts, with texts converted to the form their setting takes."""
    tree: dict[str, Any] = {}
    for path, leaf in layer.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf.value
    return convert_texts(tree, Settings)


def convert_texts(tree: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """`tree` with every `Text` that belongs to a field of `model` made ready for validation: lists split, JSON read.

    Texts elsewhere (below `options`, unknown keys) are kept as they are."""
    converted: dict[str, Any] = {}
    for name, value in tree.items():
        field = model.model_fields.get(name)
        nested = section_model(field.annotation) if field else None
        if nested is not None and isinstance(value, Mapping):
            converted[name] = convert_texts(value, nested)
        elif field is not None and isinstance(value, Text):
            converted[name] = _convert(value, field.annotation)
        else:
            converted[name] = value
    return converted


def _convert(text: Text, annotation: Any) -> Any:
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    origins = [get_origin(member) or member for member in members]
    if type(None) in origins and text.lower() in ("none", "null"):
        return None
    if any(origin in (list, tuple, set, frozenset) for origin in origins):
        return _read_json(text) if text.startswith("[") else [word.strip() for word in text.split(",") if word.strip()]
    if any(origin is dict or section_model(origin) for origin in origins):
        return _read_json(text)
    return str(text)


def _read_json(text: str) -> Any:
    """The JSON value, or `text` itself for validation to complain about."""
    try:
        return json.loads(text)
    except ValueError:
        return str(text)


def _flatten(values: Mapping[str, Any], source: str) -> Layer:
    top = ((tuple(str(name).split(".")), value) for name, value in values.items())
    return merge([{path: Leaf(leaf, source)} for name, value in top for path, leaf in _leaves(name, value)])


def _leaves(path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in value.model_fields_set}
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves((*path, str(name)), item)
    elif isinstance(value, os.PathLike):
        yield path, os.fspath(value)
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def _merge_texts(texts: Layer) -> Layer:
    """Expand texts that hold a whole table as JSON (`--scheduler '{"use": "fcfs"}'`)."""
    layers: list[Layer] = []
    for path, leaf in texts.items():
        value = _read_json(leaf.value) if leaf.value.startswith("{") else leaf.value
        layers.append({inner: Leaf(item, leaf.source) for inner, item in _leaves(path, value)})
    return merge(layers)


def _covers(outer: KeyPath, inner: KeyPath) -> bool:
    return outer != inner and inner[: len(outer)] == outer

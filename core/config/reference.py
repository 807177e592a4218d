"""The settings as a table: one row per key. Errors, `interlace config explain` and docs/config.md read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from interlace.config.settings import Settings
from interlace.errors import nearest

ENV_PREFIX = "INTERLACE_"
ENV_DELIMITER = "__"


class Setting(NamedTuple):
    """One key, as documented."""

    key: str
    """Dotted path, e.g. `scheduler.use`."""
    type: str
    """Type and bounds in words, e.g. `integer, at least 1`."""
    default: str
    description: str

    @property
    def variable(self) -> str:
        """The environment variable of the key."""
        return variable_of(self.key)


def variable_of(key: str) -> str:
    """`scheduler.use` → `INTERLACE_SCHEDULER__USE`."""
    return ENV_PREFIX + key.replace(".", ENV_DELIMITER).upper()


def section_model(annotation: Any) -> type[BaseModel] | None:
    """The model class a field holds, or None for a plain value."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def describe(model: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Rows of `model` and of the models nested in it, in order of declaration; `prefix` ends in a dot."""
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        nested = section_model(field.annotation)
        if nested is not None:
            yield from describe(nested, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        yield Setting(
            key=prefix + name,
            type=type_in_words(schema["properties"].get(field.alias or name, {}), schema.get("$defs", {})),
            default="required" if default is PydanticUndefined else plain_text(default),
            description=" ".join((field.description or "").split()),
        )


def setting_fields(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(key, field) of each setting, as `describe` orders them: for those who need no words, which take longer."""
    for name, field in model.model_fields.items():
        nested = section_model(field.annotation)
        if nested is not None:
            yield from setting_fields(nested, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def all_settings() -> list[Setting]:
    """One row per setting of `Settings`."""
    return list(describe(Settings))


def type_in_words(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema of one field as words: `integer, at least 1, or none`."""
    if "$ref" in schema:
        return type_in_words(definitions.get(schema["$ref"].rpartition("/")[2], {}), definitions)
    if "anyOf" in schema:
        options = [type_in_words(option, definitions) for option in schema["anyOf"]]
        joint = ", or " if any("," in option for option in options) else " or "
        return joint.join(sorted(options, key=lambda option: option == "none"))
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    kind = schema.get("type", "any value")
    if kind == "array":
        return "list of " + type_in_words(schema.get("items", {}), definitions)
    if schema.get("format") == "password":
        return "secret"
    words = [{"null": "none", "object": "table", "boolean": "true or false"}.get(kind, kind)]
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
        "minLength": "of length at least",
        "maxLength": "of length at most",
        "pattern": "matching",
    }
    words += [f"{text} {schema[bound]}" for bound, text in bounds.items() if bound in schema]
    return ", ".join(words)


def plain_text(value: Any) -> str:
    """A value as one writes it in TOML, without quotes round plain words; secrets as `***`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, SecretStr):
        return "***"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(plain_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {plain_text(item)}" for key, item in value.items()) + "}"
    return str(value)


def nearest_key(key: str, keys: list[str]) -> str | None:
    """The key meant by `key`: one that ends alike (`max_num_seqs` → `scheduler.max_num_seqs`), else the closest."""
    last = key.rpartition(".")[2]
    alike = [known for known in keys if known.rpartition(".")[2] == last]
    if alike and len(last) > 3:
        return nearest(key, alike) or alike[0]
    return nearest(key, keys)

"""Settings on the command line: which words are settings, and which are left to the command's own parser."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from interlace.cli.parser import UsageError
from interlace.config import all_settings, setting_fields

_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")


def split_settings(arguments: list[str]) -> tuple[list[str], dict[str, str], str | None]:
    """Cut `arguments` into (the command's own words, dotted key → text, the `--config` file).

    A word is a setting if it is `--` and a known key (`-` may stand for `_`) or anything with a dot in it; unknown
    keys are judged by `load_settings`. Values follow as `--key=value` or `--key value`; a boolean may stand alone.
    """
    known = {key: field.annotation for key, field in setting_fields()}
    sections = {key.partition(".")[0] for key in known}
    rest: list[str] = []
    settings: dict[str, str] = {}
    config_file: str | None = None
    words = iter(range(len(arguments)))
    for place in words:
        word = arguments[place]
        if word == "--":
            rest.extend(arguments[place:])
            break
        if word == "--debug":
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        key = _key(name, known)
        is_setting = key in known or key in sections or "." in name
        if not word.startswith("--") or not (is_setting or name == "config"):
            rest.append(word)
            continue
        if not equals:
            following = arguments[place + 1] if place + 1 < len(arguments) else None
            given = _value(key, known.get(key), following)
            value = "true" if given is None else given
            if given is not None:
                next(words)
        if name == "config":
            config_file = value
        else:
            settings[key] = value
    return rest, settings, config_file


def _key(name: str, known: Container[str]) -> str:
    plain = name.replace("-", "_")
    return plain if plain in known else name


def _value(key: str, annotation: Any, following: str | None) -> str | None:
    """The word after a flag if it is the flag's value; None if the flag stands alone and means true."""
    if annotation is bool:
        return following if following is not None and following.lower() in _BOOLEANS else None
    if following is not None and not following.startswith("--"):
        return following
    if ".options." in key:
        return None
    expected = next((f" ({setting.type})" for setting in all_settings() if setting.key == key), "")
    raise UsageError(f"--{key} needs a value{expected}; one that begins with -- is written --{key}=VALUE")

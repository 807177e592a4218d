"""Prompts from the command line and from files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interlace.cli.parser import UsageError


def read_prompts(name: str) -> list[Any]:
    """The prompts of a file, `-` for stdin: `.json` an array, `.jsonl` one JSON value a line, else one text a line.

    A JSON prompt is anything `LLM.generate` takes. Blank lines are left out. Raises `UsageError` naming file and
    line."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--prompts-file {name}: cannot be read as UTF-8 text: {error}") from error
    prompts = list(_parse(name, text))
    if not prompts:
        raise UsageError(f"--prompts-file {name}: there is no prompt in it")
    return prompts


def _parse(name: str, text: str) -> Iterator[Any]:
    if name.endswith(".json"):
        prompts = _load(name, text)
        if not isinstance(prompts, list):
            raise UsageError(f"--prompts-file {name}: a JSON array of prompts is expected")
        yield from prompts
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _load(f"{name}, line {number}", line) if name.endswith(".jsonl") else line


def _load(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"--prompts-file {where}: not JSON: {error}") from error


def as_chat(prompt: Any, system: str | None) -> Any:
    """A text as the first message of a conversation; other prompts unchanged."""
    if not isinstance(prompt, str):
        return prompt
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


def title(prompt: Any) -> str:
    """A prompt in one line, for people."""
    if isinstance(prompt, dict):
        prompt = next(iter(prompt.values()), "")
    if isinstance(prompt, list):
        last = prompt[-1] if prompt else ""
        prompt = last.get("content", "") if isinstance(last, dict) else f"{len(prompt)} token ids"
    return " ".join(str(prompt).split())

"""The input of a batch: one request a line, read as a stream, whatever its size."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from interlace.batch.errors import BatchError
from interlace.errors import did_you_mean

MAX_LINE = 64 * 1024 * 1024
"""Bytes of one line; a longer one gets an error record and is never held whole."""
URLS = ("/v1/chat/completions", "/v1/completions")


class BatchLine(msgspec.Struct, frozen=True, kw_only=True):
    """One request."""

    number: int
    """Of the line in the input file, from 1."""
    custom_id: str
    url: str
    body: dict[str, Any]


class BadLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line that is no request. It is answered with an error record."""

    number: int
    custom_id: str | None
    code: str
    message: str


class InputSummary(msgspec.Struct, frozen=True):
    """What one look through the whole input tells."""

    lines: int
    """Lines that are not blank."""
    last: int
    """Number of the last of them; blank lines are numbered, too."""


class _Fields(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


class _Id(msgspec.Struct):
    custom_id: str


def raw_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, bytes) of the lines that are not blank; None of a line above `MAX_LINE`.

    Raises `BatchError` if the file cannot be read."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE):
                number += 1
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                        pass
                    yield number, None
                elif line.strip():
                    yield number, line
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error}") from error


def check_input(path: Path) -> InputSummary:
    """Count the lines and see that no `custom_id` occurs twice, in 8 bytes of memory a line.

    Raises `BatchError` naming the id and its lines: their answers could not be told apart by it."""
    count, last, hashes = 0, 0, array("q")
    for number, line in raw_lines(path):
        count, last = count + 1, number
        custom_id = _custom_id(line)
        if custom_id is not None:
            hashes.append(hash(custom_id))
    values, occurrences = np.unique(np.frombuffer(hashes, dtype=np.int64), return_counts=True)
    suspects = set(values[occurrences > 1].tolist())
    first: dict[str, int] = {}
    for number, line in raw_lines(path) if suspects else ():
        custom_id = _custom_id(line)
        if custom_id is None or hash(custom_id) not in suspects:
            continue
        if custom_id in first:
            raise BatchError(
                f"{path}: custom_id '{custom_id}' occurs in lines {first[custom_id]} and {number}. Each line needs an "
                "id of its own, by which its answer is found"
            )
        first[custom_id] = number
    return InputSummary(count, last)


def parse_line(number: int, line: bytes | None) -> BatchLine | BadLine:
    """Read one line. What is wrong with it, and which field, is in the `BadLine`."""

    def bad(code: str, message: str) -> BadLine:
        return BadLine(number=number, custom_id=_custom_id(line), code=code, message=f"line {number}: {message}")

    if line is None:
        return bad("line_too_long", f"longer than {MAX_LINE} bytes")
    try:
        fields = msgspec.json.decode(line, type=_Fields)
    except msgspec.ValidationError as error:
        return bad(
            "invalid_request_line",
            f"{error}. A line is an object with custom_id (text), method (POST), url and body (object)",
        )
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return bad("invalid_json_line", f"not JSON: {error}")
    if fields.method != "POST":
        return bad("invalid_method", f"method '{fields.method}' is not supported: it must be POST")
    if fields.url not in URLS:
        hint = did_you_mean(fields.url, URLS)
        return bad("invalid_url", f"url '{fields.url}' is not supported.{hint} Supported: {', '.join(URLS)}")
    return BatchLine(number=number, custom_id=fields.custom_id, url=fields.url, body=fields.body)


def _custom_id(line: bytes | None) -> str | None:
    """The id of a line, as far as it can be told."""
    if line is None:
        return None
    try:
        return msgspec.json.decode(line, type=_Id).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None

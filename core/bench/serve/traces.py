"""Recorded traffic of real services: when requests came and how long they were, in the three published formats.

Azure 2023 (CSV: TIMESTAMP, ContextTokens, GeneratedTokens), BurstGPT (CSV: Timestamp, Model, Request tokens, Response
tokens, Total tokens, Log Type) and Mooncake (JSON lines: timestamp in ms, input_length, output_length, hash_ids).
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec

from interlace.bench.workloads import WorkloadError

BLOCK_TOKENS = 512
"""Tokens that one hash id of a Mooncake trace stands for."""

TraceFormat = Literal["azure", "mooncake", "burstgpt"]


class TraceRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a trace."""

    time_s: float
    """From an arbitrary zero."""
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()
    """Of each 512 tokens of the prompt; equal ids are equal tokens."""


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def detect_format(path: Path) -> TraceFormat:
    """Which of the formats a file has, by its first line. Raises `WorkloadError` naming what was found."""
    with _reading(path) as file:
        first = file.readline(1 << 20)
    if first.lstrip().startswith("{") and '"hash_ids"' in first:
        return "mooncake"
    columns = {column.strip().lower() for column in first.split(",")}
    if {"timestamp", "contexttokens", "generatedtokens"} <= columns:
        return "azure"
    if {"timestamp", "request tokens", "response tokens"} <= columns:
        return "burstgpt"
    raise WorkloadError(
        f"{path} is no known trace: its first line is {first.strip()[:80]!r}. Known: azure (CSV with TIMESTAMP, "
        "ContextTokens, GeneratedTokens), burstgpt (CSV with Timestamp, Request tokens, Response tokens), mooncake "
        "(JSON lines with timestamp, input_length, output_length, hash_ids)"
    )


def read_trace(path: Path, count: int | None = None, fits: Callable[[TraceRow], bool] | None = None) -> list[TraceRow]:
    """The first `count` requests (all if None) that have tokens in and out and that `fits`, by time.

    Requests that failed when the trace was taken have no tokens out, and are left out. Raises `WorkloadError` naming
    file, line and cause."""
    form = detect_format(path)
    rows = _mooncake(path) if form == "mooncake" else _table(path, _azure_row if form == "azure" else _burstgpt_row)
    usable = (row for row in rows if row.input_len > 0 and row.output_len > 0 and (fits is None or fits(row)))
    found = list(itertools.islice(usable, count))
    if not found:
        raise WorkloadError(f"{path}: no request of this trace can be used")
    return sorted(found, key=lambda row: row.time_s)


def _reading(path: Path) -> io.TextIOWrapper:
    try:
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise WorkloadError(f"{path} cannot be read: {error}") from error


def _mooncake(path: Path) -> Iterator[TraceRow]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise WorkloadError(f"{path}, line {number}: not a request of a Mooncake trace: {error}") from error
        yield TraceRow(
            time_s=record.timestamp / 1e3,
            input_len=record.input_length,
            output_len=record.output_length,
            hash_ids=tuple(record.hash_ids),
        )


def _table(path: Path, make: Callable[[Mapping[str, str]], TraceRow]) -> Iterator[TraceRow]:
    lines = _lines(path)
    columns = [column.strip().lower() for column in next(csv.reader([next(lines)[1]]))]
    numbers: list[int] = []

    def texts() -> Iterable[str]:
        for number, line in lines:
            numbers[:] = [number]
            yield line

    for cells in csv.reader(texts()):
        if not cells:
            continue
        try:
            yield make(dict(zip(columns, cells, strict=True)))
        except ValueError as error:
            raise WorkloadError(f"{path}, line {numbers[0]}: not a request of this trace: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _reading(path) as file:
        try:
            yield from enumerate(file, start=1)
        except UnicodeDecodeError as error:
            raise WorkloadError(f"{path} is not UTF-8 text: {error}") from error


def _azure_row(row: Mapping[str, str]) -> TraceRow:
    # Seven digits of a second: one more than datetime reads.
    whole, _, fraction = row["timestamp"].strip().partition(".")
    digits = "".join(itertools.takewhile(str.isdigit, fraction))
    moment = datetime.fromisoformat(whole)
    seconds = (moment - datetime(2000, 1, 1)).total_seconds() + float(f"0.{digits or 0}")
    return TraceRow(time_s=seconds, input_len=int(row["contexttokens"]), output_len=int(row["generatedtokens"]))


def _burstgpt_row(row: Mapping[str, str]) -> TraceRow:
    return TraceRow(
        time_s=float(row["timestamp"]), input_len=int(row["request tokens"]), output_len=int(row["response tokens"])
    )

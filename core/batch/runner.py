"""The run itself: lines read, answered and recorded, with a bounded number of them in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from interlace.batch.journal import BatchFailure, BatchRecord, BatchResponse, Journal, record_id
from interlace.batch.lines import BadLine, BatchLine, parse_line, raw_lines

FSYNC_INTERVAL_S = 5.0
"""Most seconds of answers that a power cut may undo."""

Answer = Callable[[BatchLine], Awaitable[BatchResponse]]
"""Answers one request, also a bad one (with its status). Raises only what must stop the run, such as a dead engine."""


class BatchProgress:
    """How far a run is, for whoever shows it."""

    def __init__(self, total: int, journal: Journal) -> None:
        self.total = total
        self._journal = journal
        self.before = journal.done
        """Lines that were done when the run began."""
        self.prompt_tokens = 0
        self.output_tokens = 0
        """Of this run, by the usage in the answers."""

    @property
    def done(self) -> int:
        """Lines with a record, of this run and those before."""
        return self._journal.done

    @property
    def failed(self) -> int:
        """Those of them without a good answer."""
        return self._journal.failed

    def eta_s(self, elapsed_s: float) -> float | None:
        """Seconds to go, if the lines left take as long as those of this run so far."""
        now = self.done - self.before
        return None if now == 0 else elapsed_s / now * (self.total - self.done)

    def add(self, body: Any) -> None:
        """Count the tokens of one answer."""
        usage = body.get("usage") if isinstance(body, dict) else None
        if isinstance(usage, dict):
            self.prompt_tokens += usage.get("prompt_tokens") or 0
            self.output_tokens += usage.get("completion_tokens") or 0


async def run_batch(
    source: Path, journal: Journal, answer: Answer, max_in_flight: int, progress: BatchProgress
) -> None:
    """Answer every line of `source` that `journal` has no record of. Records come in the order in which answers do.

    Stops at the first error that is not a line's own, and raises it; what was recorded stays. Raises `BatchError`."""
    lines = _open_lines(source, journal)
    loop = asyncio.get_running_loop()

    async def work() -> None:
        for line in lines:  # shared: whoever is free takes the next one
            record = await _record(line, answer)
            journal.append(record)
            if record.response is not None:
                progress.add(record.response.body)
            await asyncio.sleep(0)

    async def sync() -> None:
        while True:
            await asyncio.sleep(FSYNC_INTERVAL_S)
            await loop.run_in_executor(None, journal.sync)

    syncing = asyncio.create_task(sync())
    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(max_in_flight):
                workers.create_task(work())
            syncing.add_done_callback(lambda task: _stop_for(task, workers))
    except BaseExceptionGroup as group:
        raise _first(group) from None
    finally:
        syncing.cancel()


def _stop_for(task: asyncio.Task[None], workers: asyncio.TaskGroup) -> None:
    """A failed fsync stops the run like a failed write."""
    error = None if task.cancelled() else task.exception()
    if error is not None:

        async def fail() -> None:
            raise error

        workers.create_task(fail())


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _open_lines(source: Path, journal: Journal) -> Iterator[BatchLine | BadLine]:
    """Lines without a record, one by one."""
    for number, line in raw_lines(source):
        parsed = parse_line(number, line)
        if not journal.is_done(number, parsed.custom_id):
            yield parsed


async def _record(line: BatchLine | BadLine, answer: Answer) -> BatchRecord:
    record = BatchRecord(id=record_id(line.number), custom_id=line.custom_id, response=None, error=None)
    if isinstance(line, BadLine):
        record.error = BatchFailure(code=line.code, message=line.message)
    else:
        record.response = await answer(line)
    return record

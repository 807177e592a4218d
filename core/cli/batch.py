"""`interlace batch`: answer a file of requests in OpenAI's batch format, and go on where a run was cut off."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interlace.cli.parser import UsageError

if TYPE_CHECKING:
    from interlace.batch.journal import Journal
    from interlace.batch.lines import InputSummary
    from interlace.batch.runner import BatchProgress
    from interlace.config import LoadedSettings

SEATS = 2
"""Lines in flight per seat of the engine: as many again wait at its door, so that no seat is empty for long."""


def add_parser(subparsers: Any) -> None:
    """Declare `batch`."""
    parser = subparsers.add_parser(
        "batch",
        help="answer a file of requests, resumably",
        description="Answer the requests of a JSON-lines file in OpenAI's batch format, in this process. Give the same "
        "command again after an interruption: it goes on with the lines that have no answer. Answers come in the order "
        "in which they are done. Exit code: 0 all answered, 1 some lines failed, 2 the run stopped.",
    )
    parser.add_argument("input", metavar="IN.jsonl", help='{"custom_id", "method", "url", "body"} in each line')
    parser.add_argument("output", metavar="OUT.jsonl", help="answers, appended: {id, custom_id, response, error}")
    parser.add_argument("--max-in-flight", type=_count, metavar="N", help="lines answered at once (twice max_num_seqs)")
    parser.add_argument("--retry-failed", action="store_true", help="answer lines again that failed in an earlier run")


def _count(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small, the least is 1")
    return value


def run(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    """Answer what has no answer yet; 1 if some lines of the output failed."""
    from interlace.batch.errors import BatchError
    from interlace.batch.journal import Journal
    from interlace.batch.lines import check_input
    from interlace.batch.runner import BatchProgress

    source, output = Path(args.input), Path(args.output)
    if output.exists() and source.exists() and output.samefile(source):
        raise UsageError(f"{source} is input and output at once: the output needs a file of its own")
    summary = check_input(source)
    with Journal(output, retry_failed=args.retry_failed) as journal:
        if journal.last_done > summary.last:
            raise BatchError(
                f"{output} has an answer to line {journal.last_done}, but {source} ends at line {summary.last}: the "
                "output belongs to another input file. Choose another output"
            )
        _say_start(journal, summary)
        progress = BatchProgress(summary.lines, journal)
        if journal.done < summary.lines:
            asyncio.run(_answer_all(source, journal, progress, args.max_in_flight, loaded))
        _say_end(output, journal, progress)
        return int(journal.failed > 0)


async def _answer_all(
    source: Path, journal: Journal, progress: BatchProgress, max_in_flight: int | None, loaded: LoadedSettings
) -> None:
    from interlace.batch.answering import engine_answer
    from interlace.batch.progress import show_progress
    from interlace.batch.runner import run_batch
    from interlace.cli.startup import print_startup
    from interlace.clock import MonotonicClock
    from interlace.engine.async_llm import AsyncLLM

    async with AsyncLLM.from_loaded(loaded, supervised=True) as llm:
        print_startup(llm.front)
        showing = asyncio.create_task(show_progress(progress, MonotonicClock()))
        try:
            most = max_in_flight or SEATS * llm.front.num_seats
            await run_batch(source, journal, engine_answer(llm), most, progress)
        finally:
            showing.cancel()
            await asyncio.wait([showing])


def _say_start(journal: Journal, summary: InputSummary) -> None:
    if journal.repaired:
        _say(f"cut {journal.repaired} bytes of an unfinished record off the end of {journal.path}")
    if journal.done:
        failed = f" ({journal.failed} of them failed: --retry-failed tries them again)" if journal.failed else ""
        _say(f"{journal.done:,} of {summary.lines:,} lines are answered already{failed}")


def _say_end(output: Path, journal: Journal, progress: BatchProgress) -> None:
    failed = f", {journal.failed:,} of them with an error" if journal.failed else ""
    _say(
        f"{output}: {journal.done:,} lines answered{failed}; in this run {journal.done - progress.before:,} lines, "
        f"{progress.prompt_tokens:,} tokens in, {progress.output_tokens:,} out"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

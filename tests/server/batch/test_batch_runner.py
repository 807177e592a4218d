"""The run of a batch without a model: everything answered once, bounded, resumable, stopped by what must stop it."""

import asyncio
import json
import random
import signal
import subprocess
import sys
import time

import pytest

from interlace.batch.errors import BatchError
from interlace.batch.journal import BatchResponse, Journal
from interlace.batch.progress import describe
from interlace.batch.runner import BatchProgress, run_batch
from interlace.errors import EngineDeadError


def write_input(path, count, bad=()):
    with path.open("w") as file:
        for number in range(1, count + 1):
            request = {"custom_id": f"c{number}", "method": "POST", "url": "/v1/completions", "body": {"n": number}}
            file.write("oops\n" if number in bad else json.dumps(request) + "\n")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


async def answer(line):
    await asyncio.sleep(0)
    body = {"twice": line.body["n"] * 2, "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    return BatchResponse(status_code=200, request_id=f"r{line.number}", body=body)


async def run(source, output, answer=answer, most=4, total=0):
    with Journal(output) as journal:
        progress = BatchProgress(total, journal)
        await run_batch(source, journal, answer, most, progress)
        return progress


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


async def test_every_line_is_answered_once(files):
    source, output = files
    write_input(source, 50, bad={7, 9})
    progress = await run(source, output, total=50)
    found = {record["id"]: record for record in records(output)}
    assert len(found) == 50 == len(records(output))
    for number in range(1, 51):
        record = found[f"batch_req_{number}"]
        if number in (7, 9):
            assert record["response"] is None and record["custom_id"] is None
            assert record["error"]["code"] == "invalid_json_line" and f"line {number}" in record["error"]["message"]
        else:
            assert record["custom_id"] == f"c{number}" and record["error"] is None
            assert record["response"]["body"]["twice"] == 2 * number
    assert (progress.done, progress.failed, progress.prompt_tokens, progress.output_tokens) == (50, 2, 144, 96)


async def test_no_more_lines_are_held_than_allowed(files):
    source, output = files
    write_input(source, 40)
    now, most = 0, 0

    async def counting(line):
        nonlocal now, most
        now += 1
        most = max(most, now)
        for _ in range(line.body["n"] % 5 + 1):
            await asyncio.sleep(0)
        now -= 1
        return await answer(line)

    await run(source, output, counting, most=6)
    assert most == 6 and len(records(output)) == 40


async def test_a_later_run_answers_the_rest(files):
    source, output = files
    write_input(source, 20)
    await run(source, output)
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:8]) + lines[8][:-5])
    asked = []

    async def noting(line):
        asked.append(line.number)
        return await answer(line)

    progress = await run(source, output, noting, total=20)
    assert len(asked) == 12 and sorted(r["id"] for r in records(output)) == sorted(
        f"batch_req_{n}" for n in range(1, 21)
    )
    assert (progress.before, progress.done) == (8, 20)
    await run(source, output, noting)
    assert len(asked) == 12, "nothing was left to do"


async def test_a_dead_engine_stops_the_run_and_loses_nothing(files):
    source, output = files
    write_input(source, 20)

    async def dying(line):
        if line.number == 10:
            raise EngineDeadError("it is dead")
        return await answer(line)

    with pytest.raises(EngineDeadError, match="it is dead"):
        await run(source, output, dying)
    kept = len(records(output))
    assert 0 < kept < 20 and "batch_req_10" not in {record["id"] for record in records(output)}
    await run(source, output)
    assert len({record["id"] for record in records(output)}) == len(records(output)) == 20


async def test_a_changed_input_is_noticed(files):
    source, output = files
    write_input(source, 5)
    await run(source, output)
    source.write_text(source.read_text().replace('"c3"', '"other"'))
    with pytest.raises(BatchError, match="answer to another line 3"):
        await run(source, output)


async def test_progress_is_told(files):
    source, output = files
    write_input(source, 10)
    with Journal(output) as journal:
        progress = BatchProgress(10, journal)
        assert describe(progress, 0.0) == "0 of 10 lines, 0 tokens/s"

        async def until_six(line):
            if line.number == 7:
                raise EngineDeadError("stop")
            return await answer(line)

        with pytest.raises(EngineDeadError):
            await run_batch(source, journal, until_six, 1, progress)
        assert describe(progress, 60.0) == "6 of 10 lines, 0 tokens/s, 40 s to go"
        assert describe(progress, 3.0) == "6 of 10 lines, 4 tokens/s, 2 s to go"
        assert progress.eta_s(36_000.0) == 24_000.0 and describe(progress, 36_000.0).endswith("6 h 40 min to go")


KILLED = """
import asyncio, sys
from pathlib import Path
from interlace.batch.journal import BatchResponse, Journal
from interlace.batch.runner import BatchProgress, run_batch

async def answer(line):
    await asyncio.sleep(0.001 * (line.number % 7))
    return BatchResponse(status_code=200, request_id="r", body={"text": str(line.number) * 3000})

source, output = map(Path, sys.argv[1:])
with Journal(output) as journal:
    print(journal.done, flush=True)
    asyncio.run(run_batch(source, journal, answer, 16, BatchProgress(0, journal)))
"""


def test_kills_at_any_moment_lose_and_double_nothing(files):
    source, output = files
    write_input(source, 600, bad={300})
    draw = random.Random(5)
    command = [sys.executable, "-c", KILLED, str(source), str(output)]
    begun = []
    for share in (0.0, 0.01, 0.15, 0.3, 0.3, 0.55, 0.8, None):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        begun.append(int(process.stdout.readline()))
        if share is not None:  # of what the output will be
            while output.stat().st_size < share * 600 * 9000 and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(draw.uniform(0.0, 0.003))
            process.kill()
        assert process.wait() == (0 if share is None else -signal.SIGKILL)
        process.stdout.close()
    assert begun == sorted(begun) and len({done for done in begun if 0 < done < 600}) >= 4
    found = records(output)
    assert sorted(int(record["id"].rpartition("_")[2]) for record in found) == list(range(1, 601))
    good = [record for record in found if record["error"] is None]
    assert all(r["response"]["body"]["text"] == r["custom_id"][1:] * 3000 for r in good) and len(good) == 599

"""What the client itself adds: the run's own load, and as much as it can take, against a server that does no work."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence

import msgspec

from interlace.bench.metrics import Distribution, distribution
from interlace.bench.serve.load import LoadRun, run_load
from interlace.bench.serve.target import Target
from interlace.bench.serve.workloads import ServeItem
from interlace.clock import Clock
from interlace.errors import InterlaceError

PACE_S = 0.02
"""Seconds between the tokens of an answer of the null server, while the run's own load is imitated."""
LOAD_SECONDS = 8.0
"""So much of the run's arrivals is imitated."""
MAX_ANSWER = 256
FULL_STREAMS = 64
FULL_REQUESTS = 1000
FULL_TOKENS = 400


class SelfTest(msgspec.Struct, frozen=True, kw_only=True):
    """What the client adds. Latency: from the null server's sending a token to the client's noting it."""

    requests: int
    """Of the imitated load."""
    added_latency_s: Distribution
    send_lag_s: Distribution
    cpu_share: float
    """Processor time of the client under the imitated load, by its duration."""
    max_requests_per_s: float
    """One-token requests, 64 at a time, as fast as they go; client and null server share the machine."""
    max_tokens_per_s: float
    """Tokens of 64 streams, each token a chunk, as fast as they go."""


async def measure_client(
    target: Target, items: Sequence[ServeItem], times: Sequence[float], clock: Clock, max_concurrency: int | None
) -> SelfTest:
    """Measure with requests like those of the run. Raises `InterlaceError` if the null server cannot be used."""
    part = [(item, time) for item, time in zip(items, times, strict=True) if time - times[0] <= LOAD_SECONDS]
    own = [msgspec.structs.replace(item, max_tokens=min(item.max_tokens, MAX_ANSWER)) for item, _ in part]
    one, many = ServeItem("a", 1), ServeItem("a", FULL_TOKENS)
    async with null_server() as url:
        null = msgspec.structs.replace(target, base_url=url, api_key=None, timeout_s=60.0, extra_body={})
        paced = msgspec.structs.replace(null, extra_body={"interval_s": PACE_S})
        load = await run_load(paced, own, [time for _, time in part], clock, max_concurrency=max_concurrency)
        requests = await run_load(
            null, [one] * FULL_REQUESTS, [0.0] * FULL_REQUESTS, clock, max_concurrency=FULL_STREAMS
        )
        tokens = await run_load(null, [many] * FULL_STREAMS, [0.0] * FULL_STREAMS, clock)
    for run in (load, requests, tokens):
        _check(run)
    added = distribution(
        came - sent
        for exchange in load.exchanges
        for came, sent in zip(exchange.chunk_times, exchange.server_times, strict=True)
    )
    lag = distribution(exchange.sent - exchange.ready for exchange in load.exchanges)
    assert added is not None and lag is not None
    return SelfTest(
        requests=len(part),
        added_latency_s=added,
        send_lag_s=lag,
        cpu_share=load.cpu_s / load.duration_s,
        max_requests_per_s=FULL_REQUESTS / requests.duration_s,
        max_tokens_per_s=FULL_STREAMS * FULL_TOKENS / tokens.duration_s,
    )


def _check(run: LoadRun) -> None:
    failed = next((exchange for exchange in run.exchanges if exchange.error is not None), None)
    if failed is not None:
        raise InterlaceError(f"the self-test failed against its own server ({failed.error}): {failed.message}")


@contextlib.asynccontextmanager
async def null_server() -> AsyncIterator[str]:
    """The null server in a process of its own; gives its base URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "interlace.bench.serve.null_server",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        port = (await process.stdout.readline()).strip().decode()
        if not port:
            raise InterlaceError("the null server of the self-test did not start; its error stands above")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.stdin.close()
        await process.wait()

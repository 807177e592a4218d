"""A real server for the tests of everything that speaks to one: uvicorn in a thread, the embedded model."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from interlace.clock import MonotonicClock
from interlace.config import load_settings
from interlace.engine.async_llm import AsyncLLM
from interlace.engine.client import EngineClient
from interlace.engine.front import Front
from interlace.server.app import create_app
from interlace.server.auth import read_keys
from interlace.server.http import make_server, wrap
from interlace.server.metrics.http import CountRequests
from interlace.server.state import ServerState
from interlace.testing.front import fake_assembly

MODEL = "smollm2"
SMALL = {
    "dtype": "float32",
    "max_model_len": 2048,
    "cache": {"memory": "192MiB"},
    "logits_processors": {"use": ["no_repeat_ngram"]},
}


class Running(NamedTuple):
    """A server under way."""

    url: str
    """`http://127.0.0.1:PORT`; the API is under `/v1`."""
    llm: AsyncLLM
    loop: asyncio.AbstractEventLoop


@contextlib.contextmanager
def run_server(llm: AsyncLLM | None = None, **settings: Any) -> Iterator[Running]:
    """Serve `llm`, or a new engine with `settings`, as `interlace serve` does, until the end of the block."""
    loaded = llm.loaded if llm is not None else load_settings(env={}, constructor=settings)
    started: list[Any] = []
    ready = threading.Event()

    async def main() -> None:
        engine = llm or AsyncLLM.from_loaded(loaded)
        await engine.start()
        options = loaded.settings.server
        state = ServerState(engine, options, (MODEL, "alias/of-it"), created=1_700_000_000)
        routes = create_app(state)
        _, app = wrap(routes, options, read_keys(loaded), 256, MonotonicClock())
        if options.metrics:
            app = CountRequests(app, routes.state.http_totals)
        http = make_server(app, options, None)
        listener = socket.create_server(("127.0.0.1", 0))
        started.extend((engine, asyncio.get_running_loop(), http, listener.getsockname()[1]))
        ready.set()
        await http.serve(sockets=[listener])
        await engine.shutdown()

    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="test-server")
    thread.start()
    ready.wait()
    if failures:
        raise failures[0]
    engine, loop, http, port = started
    try:
        yield Running(f"http://127.0.0.1:{port}", engine, loop)
    finally:
        loop.call_soon_threadsafe(http.stop)
        thread.join()
    if failures:
        raise failures[0]


@pytest.fixture(scope="session")
def serving() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    """`with serving(server={…}) as running` serves with settings of one's own, beside those of `SMALL`."""
    return lambda **settings: run_server(**(SMALL | settings))


@pytest.fixture(scope="session")
def serving_engine() -> Callable[[EngineClient], contextlib.AbstractContextManager[Running]]:
    """`with serving_engine(client) as running` serves over a fake engine, with a byte tokenizer."""
    return lambda client: run_server(AsyncLLM.from_front(Front(fake_assembly(client))))


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    """One server for all tests of a worker: its address, and the engine and the loop inside."""
    with run_server(**SMALL) as server:
        yield server


@pytest.fixture(scope="session")
def server(running: Running) -> str:
    """`http://127.0.0.1:PORT` of a real server."""
    return running.url

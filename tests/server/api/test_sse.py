"""Streams and waiting: what fails before and after the first event, silence, and clients that leave."""

import asyncio
import contextlib

import pytest
from starlette.requests import ClientDisconnect

from interlace.clock import MonotonicClock
from interlace.errors import RequestFailedError
from interlace.server.sse import KEEP_ALIVE, EventStream, event, until_disconnect


class Client:
    """The other end of an ASGI application."""

    def __init__(self):
        self.sent = []
        self.left = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()

    async def receive(self):
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await self.reading.wait()
        self.sent.append(message)

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.sent)


async def run(events, client, keep_alive=0.0):
    await EventStream(events, keep_alive, MonotonicClock())({"type": "http"}, client.receive, client.send)


async def test_events_pass_and_the_answer_ends():
    async def events():
        yield event(b"1")
        yield event(b"2")

    client = Client()
    await run(events(), client)
    assert [message["type"] for message in client.sent] == ["http.response.start"] + ["http.response.body"] * 3
    assert client.body == b"data: 1\n\ndata: 2\n\n"
    assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_what_fails_before_the_first_event_is_no_stream():
    async def events():
        raise RequestFailedError("no room", "kv_capacity")
        yield b""

    client = Client()
    with pytest.raises(RequestFailedError):
        await run(events(), client)
    assert client.sent == []


@pytest.mark.parametrize(
    ("error", "words"),
    [(RequestFailedError("too late", "deadline"), b'"too late"'), (KeyError("x"), b"internal error")],
)
async def test_what_fails_later_is_the_last_event(error, words):
    async def events():
        yield event(b"1")
        raise error

    client = Client()
    await run(events(), client)
    first, last = client.body.split(b"\n\n")[:2]
    assert first == b"data: 1" and last.startswith(b'data: {"error":{"message":') and words in last
    assert b"[DONE]" not in client.body and client.sent[-1]["more_body"] is False


async def test_silence_is_filled():
    heard = asyncio.Event()

    async def events():
        await heard.wait()
        yield event(b"1")

    client = Client()
    stream = asyncio.ensure_future(run(events(), client, keep_alive=0.01))
    async with asyncio.timeout(60):
        while client.body.count(KEEP_ALIVE) < 3:
            await asyncio.sleep(0.005)
    heard.set()
    await stream
    assert client.body.replace(KEEP_ALIVE, b"") == b"data: 1\n\n"
    assert client.sent[0]["status"] == 200


@pytest.mark.parametrize("stuck", ["waiting for an event", "waiting for the reader"])
async def test_a_client_that_leaves_closes_the_events(stuck):
    closed = asyncio.Event()

    async def events():
        try:
            yield event(b"1")
            if stuck == "waiting for an event":
                await asyncio.Event().wait()
            yield event(b"2")
        finally:
            closed.set()

    client = Client()
    if stuck == "waiting for the reader":
        client.reading.clear()
    stream = asyncio.ensure_future(run(events(), client))
    await asyncio.sleep(0.01)
    assert not closed.is_set()
    client.left.set()
    async with asyncio.timeout(60):
        await stream
    assert closed.is_set()


async def test_cancelling_closes_the_events():
    closed = asyncio.Event()

    async def events():
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            closed.set()

    stream = asyncio.ensure_future(run(events(), Client()))
    await asyncio.sleep(0.01)
    stream.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await stream
    assert closed.is_set()


async def test_waiting_ends_with_the_client():
    client = Client()
    ended = asyncio.Event()

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    waiting = asyncio.ensure_future(until_disconnect(client.receive, work()))
    await asyncio.sleep(0.01)
    client.left.set()
    with pytest.raises(ClientDisconnect):
        await waiting
    assert ended.is_set()


async def test_waiting_gives_results_and_errors():
    async def value():
        return 3

    async def failure():
        raise KeyError("x")

    assert await until_disconnect(Client().receive, value()) == 3
    with pytest.raises(KeyError):
        await until_disconnect(Client().receive, failure())

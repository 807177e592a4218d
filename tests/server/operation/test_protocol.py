"""Limits on what one connection may hold, over real sockets, with an application that only answers."""

import asyncio
import contextlib
import socket

import pytest
from starlette.responses import PlainTextResponse

from interlace.config.settings import ServerSettings
from interlace.server.http import make_server


async def hello(scope, receive, send):
    if scope["type"] != "http":
        return
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body", False):
            break
    await PlainTextResponse(f"{size} bytes")(scope, receive, send)


@contextlib.asynccontextmanager
async def serving(app=hello, **settings):
    """A function that opens connections to a running server."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        address = bound.getsockname()
        server = make_server(app, ServerSettings(**settings), None)
        task = asyncio.ensure_future(server.serve(sockets=[bound]))
        yield lambda: asyncio.open_connection(*address)
        server.stop()
        await asyncio.wait_for(task, 30)


async def read(reader, end=b"bytes"):
    async with asyncio.timeout(30):
        return await reader.readuntil(end)


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"


@pytest.mark.parametrize("sent", [b"GET / HT", GET[:-2], POST, POST + b"123", b"\r\n"])
async def test_whoever_is_too_slow_is_told_and_hung_up_on(sent):
    async with serving(client_timeout_s=0.2) as connect:
        reader, writer = await connect()
        writer.write(sent)
        answer = await asyncio.wait_for(reader.read(), 30)
        assert answer.startswith(b"HTTP/1.1 408 ") or sent == b"\r\n"
        writer.close()


async def test_a_silent_connection_is_closed_without_a_word():
    async with serving(client_timeout_s=0.2) as connect:
        reader, writer = await connect()
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()


async def test_a_connection_in_use_is_kept():
    """The time is for one request, not for the connection."""
    async with serving(client_timeout_s=1.5) as connect:
        reader, writer = await connect()
        for _ in range(6):
            writer.write(GET)
            assert b" 200 OK" in await read(reader)
            await asyncio.sleep(0.3)  # in all more than the time
        writer.close()


async def test_an_answer_may_take_longer_than_a_request():
    async def slow(scope, receive, send):
        if scope["type"] == "http":
            await asyncio.sleep(0.6)
            await hello(scope, receive, send)

    async with serving(slow, client_timeout_s=0.2) as connect:
        reader, writer = await connect()
        writer.write(GET + POST + b"1234567890")  # the second one waits, through no fault of the client
        assert b"0 bytes" in await read(reader)
        assert b"10 bytes" in await read(reader)
        writer.close()


async def test_headers_without_end_are_refused():
    async with serving() as connect:
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for i in range(200):
                writer.write(b"X-%d: " % i + b"x" * 1000 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0)
        with contextlib.suppress(ConnectionError):  # it may have hung up on what was still being sent
            assert b"HTTP/1.1 431 " in await asyncio.wait_for(reader.read(), 30)
        writer.close()


async def test_large_bodies_are_no_headers():
    async with serving() as connect:
        reader, writer = await connect()
        for _ in range(3):
            body = b"x" * 1_000_000
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert b"1000000 bytes" in await read(reader)
        writer.close()


async def test_who_does_not_read_is_not_written_for():
    """The application waits as soon as a little is under way, and learns that the client is gone."""
    sent, ended = 0, asyncio.Event()

    async def endless(scope, receive, send):
        nonlocal sent
        if scope["type"] != "http" or scope["path"] != "/endless":
            return await hello(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        leaving = asyncio.ensure_future(wait_for_disconnect(receive))
        while not leaving.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            sent += 65536
        ended.set()

    async def wait_for_disconnect(receive):
        while (await receive())["type"] != "http.disconnect":
            pass

    async with serving(endless) as connect:
        _, writer = await connect()
        writer.transport.pause_reading()
        writer.write(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        before = -1
        while before != sent or not sent:
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 32 << 20  # what fits into the buffers of two sockets
        other, writing = await connect()
        writing.write(GET)
        assert b"0 bytes" in await read(other)
        writing.close()
        assert not ended.is_set()
        writer.transport.abort()
        await asyncio.wait_for(ended.wait(), 30)

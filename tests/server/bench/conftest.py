"""A server with OpenAI's streaming API that says what a test tells it to say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

import pytest
from aiohttp import web


class FakeOpenAI:
    """`script(body, reply)` answers each request; by default with as many words as are asked for."""

    def __init__(self):
        self.script = say_words
        self.bodies = []
        self.keys = []
        self.refused = set()
        """Fields that are answered 400."""
        self.app = web.Application(client_max_size=1 << 26)
        self.app.router.add_get("/v1/models", self._models)
        self.app.router.add_post("/v1/chat/completions", self._answer)
        self.app.router.add_post("/v1/completions", self._answer)

    async def _models(self, request):
        return web.json_response({"object": "list", "data": [{"id": "fake-model"}, {"id": "another"}]})

    async def _answer(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        for field in self.refused & set(body):
            return web.json_response({"error": {"message": f"Unknown parameter: {field}"}}, status=400)
        reply = Reply(request, body)
        await self.script(body, reply)
        return reply.response


class Reply:
    """What a script does to its request."""

    def __init__(self, request, body):
        self.request = request
        self.body = body
        self.response = None

    async def refuse(self, status, text):
        self.response = web.json_response({"error": {"message": text}}, status=status)

    async def write(self, data: bytes):
        if self.response is None:
            self.response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await self.response.prepare(self.request)
        await self.response.write(data)

    async def event(self, **fields):
        await self.write(b"data: " + json.dumps(fields).encode() + b"\n\n")

    async def token(self, text, finish_reason=None, **fields):
        choice = {"index": 0, "finish_reason": finish_reason, **fields}
        if "messages" in self.body:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        await self.event(id="x", choices=[choice])

    async def usage(self, completion_tokens, prompt_tokens=5, cached_tokens=0):
        details = {"cached_tokens": cached_tokens}
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "prompt_tokens_details": details,
        }
        await self.event(id="x", choices=[], usage=usage)

    async def done(self):
        await self.write(b"data: [DONE]\n\n")

    def hang_up(self):
        self.request.transport.abort()


def tokens_asked(body):
    return body.get("max_tokens") or body["max_completion_tokens"]


async def say_words(body, reply):
    count = tokens_asked(body)
    if "messages" in body:
        await reply.event(id="x", choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    for number in range(count):
        await reply.token(" word", "length" if number == count - 1 else None)
    if body.get("stream_options", {}).get("include_usage"):
        await reply.usage(count)
    await reply.done()


@contextlib.asynccontextmanager
async def listening(fake):
    runner = web.AppRunner(fake.app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
    finally:
        await runner.cleanup()


@pytest.fixture
async def fake_here():
    """(server, base URL) in the event loop of the test."""
    fake = FakeOpenAI()
    async with listening(fake) as url:
        yield fake, url


@pytest.fixture
def fake_beside():
    """(server, base URL) in a thread, for commands that have an event loop of their own."""
    fake, ready, found = FakeOpenAI(), threading.Event(), {}

    async def main():
        found["stop"] = asyncio.Event()
        found["loop"] = asyncio.get_running_loop()
        async with listening(fake) as url:
            found["url"] = url
            ready.set()
            await found["stop"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(30)
    yield fake, found["url"]
    found["loop"].call_soon_threadsafe(found["stop"].set)
    thread.join(30)
    assert not thread.is_alive()

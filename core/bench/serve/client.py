"""One request over HTTP: sent, and its tokens noted as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from interlace.bench.serve.sse import Chunk, EventReader, StreamError
from interlace.clock import Clock

if TYPE_CHECKING:
    import aiohttp

DONE = b"[DONE]"
MESSAGE_LENGTH = 300
"""Characters kept of an error's message."""


class Exchange(msgspec.Struct, kw_only=True):
    """What happened to one request. Times in clock seconds."""

    index: int
    asked_tokens: int
    due: float
    """When it should have been sent by the arrival process."""
    ready: float
    """When it could be: `due`, or later, when a request before it left room under the concurrency limit."""
    sent: float = 0.0
    """When it was handed to the HTTP library. Latencies count from here."""
    ended: float = 0.0
    chunk_times: list[float] = []
    """When each chunk that has tokens came; chunks of one read share a time."""
    chunk_tokens: list[int] = []
    """Tokens of each of those, as far as the server lets on."""
    counted_by: str | None = None
    """How `chunk_tokens` were counted: `token_ids`, `logprobs`, `usage` (running totals) or `chunks` (one each)."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    """These three by the server's usage, None if it gave none."""
    finish_reason: str | None = None
    server_times: list[float] = []
    """Of the self-test: when the null server sent each chunk of `chunk_times`."""
    error: str | None = None
    """Kind of the error; None: the answer is whole."""
    message: str = ""

    @property
    def num_tokens(self) -> int:
        """Output tokens: by the server's usage, else by what was seen."""
        return sum(self.chunk_tokens) if self.output_tokens is None else self.output_tokens


class Client:
    """Sends requests to one URL. Its session is opened and closed by the caller."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], clock: Clock, timeout_s: float
    ) -> None:
        self._session = session
        self._url = url
        self._headers = {**headers, "Content-Type": "application/json", "Accept": "text/event-stream"}
        self._clock = clock
        self._timeout_s = timeout_s
        self._decoder = msgspec.json.Decoder(Chunk)
        self.tokens_seen = 0
        """Output tokens of all requests so far, for those who watch."""

    async def send(self, body: bytes, exchange: Exchange) -> Exchange:
        """Send one request and fill in `exchange`. Errors of server and network end up in it, never outside."""
        import aiohttp

        exchange.sent = self._clock.now()
        try:
            async with asyncio.timeout(self._timeout_s or None):
                await self._stream(body, exchange)
            _judge(exchange)
        except TimeoutError:
            _fail(exchange, "timeout", f"no complete answer within {self._timeout_s:g} s")
        except aiohttp.ClientConnectorError as error:
            _fail(exchange, "connect", str(error))
        except msgspec.MsgspecError as error:
            _fail(exchange, "malformed", f"a chunk of the stream cannot be read: {error}")
        except (aiohttp.ClientError, OSError) as error:
            _fail(exchange, "disconnected", f"{type(error).__name__}: {error}")
        exchange.ended = self._clock.now()
        return exchange

    async def _stream(self, body: bytes, exchange: Exchange) -> None:
        async with self._session.post(self._url, data=body, headers=self._headers) as response:
            if response.status != 200:
                _fail(exchange, f"http_{response.status}", (await response.text(errors="replace")).strip())
                return
            if response.content_type != "text/event-stream":
                _fail(exchange, "malformed", f"the answer is {response.content_type}, not text/event-stream")
                return
            events = EventReader()
            async for received in response.content.iter_any():
                now = self._clock.now()
                for data in events.feed(received):
                    # Read on to the end even so: a connection with unread bytes cannot be used again.
                    if data != DONE:
                        self._note(self._decoder.decode(data), now, exchange)

    def _note(self, chunk: Chunk, now: float, exchange: Exchange) -> None:
        if chunk.error is not None and exchange.error is None:
            told = chunk.error
            text = f"{told.type or told.code or ''}: {told.message}" if isinstance(told, StreamError) else told
            _fail(exchange, "stream_error", text)
        tokens, how = chunk.count_tokens()
        usage = chunk.usage
        if usage is not None:
            if usage.completion_tokens is not None and chunk.choices:  # a running total
                tokens, how = usage.completion_tokens - (exchange.output_tokens or 0), "usage"
            if usage.completion_tokens is not None:
                exchange.output_tokens = usage.completion_tokens
            if usage.prompt_tokens is not None:
                exchange.prompt_tokens = usage.prompt_tokens
            if usage.prompt_tokens_details is not None:
                exchange.cached_tokens = usage.prompt_tokens_details.cached_tokens
        if tokens > 0:
            exchange.chunk_times.append(now)
            exchange.chunk_tokens.append(tokens)
            exchange.counted_by = how
            self.tokens_seen += tokens
            if chunk.sent is not None:
                exchange.server_times.append(chunk.sent)
        exchange.finish_reason = chunk.finish_reason or exchange.finish_reason


def _judge(exchange: Exchange) -> None:
    """An answer is a success only if it has tokens and ended as answers end."""
    if exchange.error is not None:
        return
    if exchange.finish_reason is None:
        _fail(exchange, "incomplete", "the stream ended without a finish_reason")
    elif exchange.finish_reason in ("error", "abort"):
        _fail(exchange, "failed", f"finish_reason is '{exchange.finish_reason}'")
    elif not exchange.chunk_times:
        _fail(exchange, "empty", "the answer has no text")


def _fail(exchange: Exchange, kind: str, message: str) -> None:
    exchange.error, exchange.message = kind, message[:MESSAGE_LENGTH]

"""Server-sent events and the chunks of an OpenAI stream, read from bytes with as little work as possible.

The client's own time is part of what it measures, so a chunk is decoded into the few fields that are looked at.
"""

from __future__ import annotations

import msgspec


class EventReader:
    """Cuts a byte stream into the data of its events. Lines end in LF or CRLF; comments and fields are left out."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """The data of the events that `received` completes."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        found = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data) if len(self._data) > 1 else self._data[0])
                self._data.clear()
        return found


class CachedTokens(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts by the server."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: CachedTokens | None = None


class _Logprobs(msgspec.Struct):
    content: list[msgspec.Raw] | None = None  # chat
    tokens: list[msgspec.Raw] | None = None  # completions


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None


class StreamError(msgspec.Struct):
    """The error object a server may send within a stream."""

    message: str | None = None
    code: str | int | None = None
    type: str | None = None


class Chunk(msgspec.Struct):
    """One event of a stream of chat or text completions."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: StreamError | str | None = None
    sent: float | None = None
    """When the null server of the self-test sent it, in clock seconds; other servers have no such field."""

    def count_tokens(self) -> tuple[int, str | None]:
        """(tokens, how they were counted: `token_ids`, `logprobs` or `chunks`) of all choices.

        A chunk with text and no further word on its tokens counts as one."""
        tokens, how = 0, None
        for choice in self.choices:
            found, by = _tokens_of(choice)
            tokens += found
            how = how or by
        return tokens, how

    @property
    def finish_reason(self) -> str | None:
        """Of the first choice that has one."""
        return next((choice.finish_reason for choice in self.choices if choice.finish_reason), None)


def _tokens_of(choice: _Choice) -> tuple[int, str | None]:
    if choice.token_ids is not None:
        return len(choice.token_ids), "token_ids"
    if choice.logprobs is not None:
        listed = choice.logprobs.content if choice.logprobs.content is not None else choice.logprobs.tokens
        if listed is not None:
            return len(listed), "logprobs"
    delta = choice.delta
    text = choice.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning))
    return (1, "chunks") if text else (0, None)

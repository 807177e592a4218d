"""Chat completions.

`ChatService.prepare(body, caller)` checks a decoded body and gives a `ChatJob`; of that, either `answer()` (a
`ChatCompletion`) or `events()` (an SSE stream of `ChatChunk`s) is used, once. Without HTTP, `respond(body)` does both
steps and gives plain data. Errors are `ApiError`s and errors of Interlace (`errors.describe` says their answers).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import msgspec
from msgspec import UNSET

from interlace.engine.detokenizer import Detokenizer
from interlace.messages import CompletionOutput, RequestOutput
from interlace.server.answers import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Usage,
)
from interlace.server.bodies import parse
from interlace.server.errors import ApiError
from interlace.server.generation import Caller, Generation, check_model, plain_prompt_logprobs, stream_options
from interlace.server.logprobs import TokenNames
from interlace.server.prompts import encode_chat
from interlace.server.requests import ChatRequest
from interlace.server.sse import DONE, event
from interlace.server.state import ServerState

_encode = msgspec.json.encode


class ChatService:
    """Answers conversations."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._detokenizer = Detokenizer(state.llm.front.tokenizer)

    def prepare(self, body: Any, caller: Caller = Caller()) -> ChatJob:  # noqa: B008  (immutable)
        """Check a decoded body. Raises `ApiError` or `InvalidRequestError`; nothing has reached the engine."""
        request = parse(ChatRequest, body)
        check_model(self._state, request.model)
        options = stream_options(request)
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs is only allowed with logprobs = true", param="top_logprobs")
        if request.stream and request.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs is not allowed with stream = true", param="prompt_logprobs")
        limits = [limit for limit in (request.max_completion_tokens, request.max_tokens) if limit is not None]
        params = request.sampling(
            max_tokens=limits[0] if limits else None,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )
        prompt = encode_chat(self._state.llm.front, request)
        generation = Generation(self._state, "chatcmpl", request, [prompt], params, caller)
        names = TokenNames(self._detokenizer, request.return_tokens_as_token_ids)
        usage = (options.include_usage, options.include_usage and options.continuous_usage_stats)
        return ChatJob(request, generation, names, usage)

    async def respond(self, body: Any, caller: Caller = Caller()) -> dict[str, Any]:  # noqa: B008  (immutable)
        """The whole answer as plain data; `stream` must not be set."""
        answer: dict[str, Any] = msgspec.to_builtins(await self.prepare(body, caller).answer())
        return answer


class ChatJob:
    """One checked request. Use `answer` or `events`, once."""

    def __init__(
        self, request: ChatRequest, generation: Generation, names: TokenNames, usage: tuple[bool, bool]
    ) -> None:
        """`usage`: whether a stream ends with usage; whether each of its chunks has it."""
        self.stream = request.stream
        self.id = generation.id
        self._request = request
        self._generation = generation
        self._names = names
        self._final_usage, self._continuous = usage

    async def answer(self) -> ChatCompletion:
        """Generate. Cancelling it aborts the request in the engine."""
        found: RequestOutput | None = None
        async with contextlib.aclosing(self._generation.outputs(streaming=False)) as outputs:
            async for _, output in outputs:
                found = output
        assert found is not None, "a generation that ends without error has an output"
        wanted = self._request
        return ChatCompletion(
            id=self.id,
            created=self._generation.created,
            model=self._generation.model,
            system_fingerprint=self._generation.fingerprint,
            choices=[self._choice(sample) for sample in sorted(found.outputs, key=lambda sample: sample.index)],
            usage=self._generation.usage(),
            prompt_token_ids=found.prompt_token_ids if wanted.return_token_ids else UNSET,
            prompt_logprobs=UNSET if wanted.prompt_logprobs is None else plain_prompt_logprobs(found.prompt_logprobs),
        )

    def _choice(self, sample: CompletionOutput) -> ChatChoice:
        return ChatChoice(
            index=sample.index,
            message=ChatAnswer(sample.text),
            logprobs=self._logprobs(sample),
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            token_ids=sample.token_ids if self._request.return_token_ids else UNSET,
        )

    def _logprobs(self, sample: CompletionOutput) -> ChatLogprobs | None:
        if sample.logprobs is None:
            return None
        return self._names.chat(sample.logprobs, self._request.top_logprobs or 0)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Generate; yields server-sent events, those of one moment together. Closing it aborts the request."""
        begun = False
        async with contextlib.aclosing(self._generation.outputs(streaming=True)) as outputs:
            async for _, output in outputs:
                chunks = [] if begun else self._opening(output)
                begun = True
                for sample in output.outputs:
                    chunks += map(self._chunk, self._deltas(sample))
                if chunks:
                    yield b"".join([event(_encode(chunk)) for chunk in chunks])
        usage = b""
        if self._final_usage:
            usage = event(_encode(self._chunk(None, self._generation.usage())))
        yield usage + DONE

    def _opening(self, output: RequestOutput) -> list[ChatChunk]:
        """A chunk per choice says who speaks."""
        chunks = [
            self._chunk(ChatChunkChoice(index=i, delta=ChatDelta("assistant", ""))) for i in range(self._generation.n)
        ]
        if self._request.return_token_ids:
            chunks[0].prompt_token_ids = output.prompt_token_ids
        return chunks

    def _deltas(self, sample: CompletionOutput) -> Iterator[ChatChunkChoice]:
        """New text, if there is any, and the end, if it has come."""
        with_ids = self._request.return_token_ids
        if sample.text or sample.logprobs or (with_ids and sample.token_ids):
            yield ChatChunkChoice(
                index=sample.index,
                delta=ChatDelta(content=sample.text),
                logprobs=self._logprobs(sample),
                token_ids=sample.token_ids if with_ids else UNSET,
            )
        if sample.finish_reason is not None:
            yield ChatChunkChoice(
                index=sample.index,
                delta=ChatDelta(),
                finish_reason=sample.finish_reason,
                stop_reason=sample.stop_reason,
            )

    def _chunk(self, choice: ChatChunkChoice | None, usage: Usage | None = None) -> ChatChunk:
        if self._continuous and usage is None:
            usage = self._generation.usage()
        return ChatChunk(
            id=self.id,
            created=self._generation.created,
            model=self._generation.model,
            system_fingerprint=self._generation.fingerprint,
            choices=[] if choice is None else [choice],
            usage=usage if self._final_usage else UNSET,
        )

"""Completions of prompts. The same shape as `interlace.server.chat`: a service prepares jobs, a job answers once."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Collection
from typing import Any

import msgspec
from msgspec import UNSET

from interlace.engine.detokenizer import Detokenizer
from interlace.messages import CompletionOutput, RequestOutput
from interlace.server.answers import Completion, CompletionChoice, CompletionLogprobs, Usage
from interlace.server.bodies import parse
from interlace.server.errors import ApiError
from interlace.server.generation import Caller, Generation, check_model, plain_prompt_logprobs, stream_options
from interlace.server.logprobs import CompletionColumns, TokenNames
from interlace.server.prompts import encode_prompts
from interlace.server.requests import CompletionRequest
from interlace.server.sse import DONE, event
from interlace.server.state import ServerState


class CompletionService:
    """Continues prompts."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._detokenizer = Detokenizer(state.llm.front.tokenizer)

    def prepare(self, body: Any, caller: Caller = Caller()) -> CompletionJob:  # noqa: B008  (immutable)
        """Check a decoded body. Raises `ApiError` or `InvalidRequestError`; nothing has reached the engine."""
        request = parse(CompletionRequest, body)
        check_model(self._state, request.model)
        options = stream_options(request)
        if request.stream and request.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs is not allowed with stream = true", param="prompt_logprobs")
        changes: dict[str, Any] = {"logprobs": request.logprobs}
        if request.echo and request.max_tokens == 0:
            changes["max_tokens"] = 1  # the engine computes a prompt in order to go on; what it says is dropped
        if request.echo and request.logprobs is not None:
            changes["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
        params = request.sampling(**changes)
        prompts = encode_prompts(self._state.llm.front, request.prompt, request.add_special_tokens, params.n)
        generation = Generation(self._state, "cmpl", request, prompts, params, caller)
        names = TokenNames(self._detokenizer, request.return_tokens_as_token_ids)
        usage = (options.include_usage, options.include_usage and options.continuous_usage_stats)
        skipped = self._state.llm.front.tokenizer.special_ids if params.skip_special_tokens else ()
        return CompletionJob(request, generation, names, usage, self._echoes(request, generation), skipped)

    def _echoes(self, request: CompletionRequest, generation: Generation) -> list[str] | None:
        """The texts that answers begin with."""
        if not request.echo:
            return None
        if isinstance(request.prompt, str) and request.truncate_prompt_tokens is None:
            return [request.prompt]
        skip = request.skip_special_tokens is not False
        decode = self._state.llm.front.tokenizer.decode
        return [decode(prepared.prompt_token_ids, skip) for prepared in generation.prepared]

    async def respond(self, body: Any, caller: Caller = Caller()) -> dict[str, Any]:  # noqa: B008  (immutable)
        """The whole answer as plain data; `stream` must not be set."""
        answer: dict[str, Any] = msgspec.to_builtins(await self.prepare(body, caller).answer())
        return answer


class CompletionJob:
    """One checked request. Use `answer` or `events`, once."""

    def __init__(
        self,
        request: CompletionRequest,
        generation: Generation,
        names: TokenNames,
        usage: tuple[bool, bool],
        echoes: list[str] | None,
        skipped: Collection[int],
    ) -> None:
        """`usage`: whether a stream ends with usage; whether each of its chunks has it. `echoes`: what answers begin
        with. `skipped`: tokens that are left out of the text."""
        self.stream = request.stream
        self.id = generation.id
        self._request = request
        self._generation = generation
        self._names = names
        self._final_usage, self._continuous = usage
        self._echoes = echoes
        self._skipped = skipped
        self._silent = request.echo and request.max_tokens == 0
        self._columns: dict[int, CompletionColumns] = {}
        self._heads: dict[int, RequestOutput] = {}
        """First output of each prompt: it has the prompt's log probabilities."""

    async def answer(self) -> Completion:
        """Generate. Cancelling it aborts the requests in the engine."""
        choices: list[CompletionChoice] = []
        async with contextlib.aclosing(self._generation.outputs(streaming=False)) as outputs:
            async for prompt, output in outputs:
                choices += [self._choice(prompt, output, sample) for sample in output.outputs]
        choices.sort(key=lambda choice: choice.index)
        return self._chunk(choices, self._usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Generate; yields server-sent events, those of one moment together. Closing it aborts the requests."""
        async with contextlib.aclosing(self._generation.outputs(streaming=True)) as outputs:
            async for prompt, output in outputs:
                choices = [self._choice(prompt, output, sample) for sample in output.outputs]
                usage = self._usage() if self._continuous else None if self._final_usage else UNSET
                data = b"".join([event(msgspec.json.encode(self._chunk([c], usage))) for c in choices if _says(c)])
                if data:
                    yield data
        last = event(msgspec.json.encode(self._chunk([], self._usage()))) if self._final_usage else b""
        yield last + DONE

    def _choice(self, prompt: int, output: RequestOutput, sample: CompletionOutput) -> CompletionChoice:
        """What a sample has new, after its prompt if that is echoed."""
        index = prompt * self._generation.n + sample.index
        head = self._heads.setdefault(prompt, output)
        first = index not in self._columns
        columns = self._columns.setdefault(index, CompletionColumns(self._names, self._skipped))
        text = "" if self._silent else sample.text
        if first and self._echoes is not None:
            text = self._echoes[prompt] + text
        wanted = self._request
        ids = [] if self._silent else sample.token_ids
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._logprobs(columns, head if first and wanted.echo else None, sample),
            finish_reason="length" if self._silent else sample.finish_reason,
            stop_reason=None if self._silent else sample.stop_reason,
            token_ids=ids if wanted.return_token_ids else UNSET,
            prompt_token_ids=head.prompt_token_ids if first and wanted.return_token_ids else UNSET,
            prompt_logprobs=UNSET if wanted.prompt_logprobs is None else plain_prompt_logprobs(head.prompt_logprobs),
        )

    def _logprobs(
        self, columns: CompletionColumns, head: RequestOutput | None, sample: CompletionOutput
    ) -> CompletionLogprobs | None:
        """Of new tokens, after those of the echoed prompt, which `head` has."""
        if sample.logprobs is None:
            return None
        ids: list[int] = []
        entries: list[Any] = []
        if head is not None:
            ids, entries = [*head.prompt_token_ids], [*(head.prompt_logprobs or [])]
        if not self._silent:
            ids, entries = ids + sample.token_ids, entries + sample.logprobs
        return columns.add(ids, entries)

    def _usage(self) -> Usage:
        usage = self._generation.usage()
        if self._silent:
            return Usage(usage.prompt_tokens, 0, usage.prompt_tokens, usage.prompt_tokens_details)
        return usage

    def _chunk(self, choices: list[CompletionChoice], usage: Any) -> Completion:
        return Completion(
            id=self.id,
            created=self._generation.created,
            model=self._generation.model,
            system_fingerprint=self._generation.fingerprint,
            choices=choices,
            usage=usage,
        )


def _says(choice: CompletionChoice) -> bool:
    """Whether a chunk is worth sending: half a character is not."""
    return bool(choice.text or choice.finish_reason or choice.logprobs or choice.token_ids)

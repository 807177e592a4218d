"""One API request in the engine: what chats and completions have in common. Knows nothing of HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

import msgspec

from interlace import __version__
from interlace.clock import local_time
from interlace.engine.front import Front
from interlace.engine.input_processor import RequestOptions
from interlace.errors import InterlaceError
from interlace.messages import Logprob, RequestOutput, SamplingParams
from interlace.messages import Usage as EngineUsage
from interlace.server.answers import PromptLogprobs, PromptTokensDetails, Usage
from interlace.server.bodies import parse
from interlace.server.errors import ApiError, describe
from interlace.server.requests import GenerationRequest, StreamOptions
from interlace.server.state import ServerState

logger = logging.getLogger("interlace.server")
MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class Caller(NamedTuple):
    """What is known of whoever asks, beside the body of the request."""

    request_id: str | None = None
    """`X-Request-Id`, or its substitute."""
    key_salt: str | None = None
    """With `server.isolate_keys`: a salt for the caller's API key."""


def check_model(state: ServerState, model: str | None) -> None:
    """Raises `ApiError` 404 unless `model` is served here; None is."""
    if model is not None and model not in state.model_names:
        known = ", ".join(f"'{name}'" for name in state.model_names)
        text = f"the model {model[:200]!r} does not exist here; served: {known}"
        raise ApiError(404, text, param="model", code="model_not_found")


def stream_options(request: GenerationRequest) -> StreamOptions:
    """The checked `stream_options`."""
    if request.stream_options is None:
        return StreamOptions()
    if not request.stream:
        raise ApiError(400, "stream_options is only allowed with stream = true", param="stream_options")
    return parse(StreamOptions, request.stream_options, "stream_options.")


def fingerprint(front: Front) -> str:
    """`system_fingerprint`: another one when the same request may be answered otherwise."""
    spec = front.spec
    told = f"{__version__} {spec.model} {spec.dtype} {spec.device} {spec.max_model_len}"
    return "fp_" + hashlib.sha256(told.encode()).hexdigest()[:12]


class Generation:
    """The prompts of one API request, validated; then under way; then counted and logged."""

    def __init__(
        self,
        state: ServerState,
        prefix: str,
        request: GenerationRequest,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        caller: Caller,
    ) -> None:
        """`prefix` begins the id. Raises `InvalidRequestError`; nothing has reached the engine."""
        front = state.llm.front
        self.id = _unused(
            front, f"{prefix}-{request.request_id or caller.request_id or secrets.token_hex(16)}", request
        )
        self.created = int(local_time().timestamp())
        self.model = state.model_names[0]
        self.fingerprint = fingerprint(front)
        self.n = params.n
        self._state = state
        self._usages: dict[int, EngineUsage] = {}
        options = RequestOptions(
            priority=request.priority,
            timeout=state.settings.request_timeout_s or None,
            cache_salt=_salt(request, caller),
            labels=request.labels,
        )
        keep = request.truncate_prompt_tokens
        many = len(prompts) > 1
        self.prepared = [
            state.llm.front.prepare(
                ids[-keep:] if keep else ids,
                params,
                request_id=f"{self.id}-{i}" if many else self.id,
                options=options,
                index=i if many else None,
            )
            for i, ids in enumerate(prompts)
        ]

    async def outputs(self, *, streaming: bool) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(index of the prompt, delta), as `AsyncLLM.run`."""
        end, reasons = "disconnected", list[str]()
        first: float | None = None
        try:
            async with contextlib.aclosing(self._state.llm.run(self.prepared, streaming=streaming)) as outputs:
                async for index, output in outputs:
                    self._usages[index] = output.usage
                    first = output.metrics.ttft if first is None else first
                    reasons += [sample.finish_reason for sample in output.outputs if sample.finish_reason]
                    yield index, output
            end = ",".join(sorted(set(reasons)))
        except InterlaceError as error:
            end = f"error {describe(error).code}"
            raise
        finally:
            self._log(end, first)

    def usage(self) -> Usage:
        """So far. Prompts count from the start; tokens that were cached, once that is known."""
        prompt = sum(len(one.prompt_token_ids) for one in self.prepared)
        completion = sum(usage.completion_tokens for usage in self._usages.values())
        cached = sum(usage.cached_tokens for usage in self._usages.values())
        return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))

    def _log(self, end: str, ttft: float | None) -> None:
        if not logger.isEnabledFor(logging.INFO):
            return
        usage = self.usage()
        fields = {
            "request_id": self.id,
            "model": self.model,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish_reason": end,
            "ttft": None if ttft is None else round(ttft, 4),
        }
        logger.info(
            "%(request_id)s: %(prompt_tokens)d prompt tokens (%(cached_tokens)d cached), %(completion_tokens)d "
            "generated by %(model)s, first after %(ttft)s s, ended by %(finish_reason)s",
            fields,
            extra={"fields": fields},
        )


def _unused(front: Front, wanted: str, request: GenerationRequest) -> str:
    """Ids that the body asks for must be unique, and the engine checks that; one from a header is made so."""
    if request.request_id is None and front.find(wanted) is not None:
        return f"{wanted}-{secrets.token_hex(4)}"
    return wanted


def _salt(request: GenerationRequest, caller: Caller) -> str | None:
    if caller.key_salt is None:
        return request.cache_salt
    return f"{caller.key_salt}:{request.cache_salt or ''}"


def plain_prompt_logprobs(entries: PromptLogprobs | None) -> PromptLogprobs:
    """`prompt_logprobs` as JSON can say them."""
    return [
        None
        if entry is None
        else {
            token: msgspec.structs.replace(found, logprob=max(found.logprob, MIN_LOGPROB))
            for token, found in entry.items()
        }
        for entry in entries or []
    ]


def clamped(found: Logprob) -> float:
    return max(found.logprob, MIN_LOGPROB)

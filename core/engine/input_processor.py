"""From what a user hands in to what the engine takes: tokens, validated parameters, one request per sample.

Everything that can be known to be wrong is refused here, as `InvalidRequestError` naming the prompt, before the engine
hears of it.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from pydantic import ValidationError

from interlace.clock import Clock
from interlace.errors import InvalidRequestError, did_you_mean
from interlace.interfaces.logits_processor import LogitsProcessor
from interlace.messages import EngineRequest, SamplingParams
from interlace.spec import Component, ResolvedSpec
from interlace.tokenizer import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message] | Mapping[str, Any]
"""A text; token ids; chat messages; or a mapping with exactly one of `prompt`, `prompt_token_ids` and `messages`,
and optionally `cache_salt`."""

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
MAX_LABELS = 32


class RequestOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a user may say of a request beside its prompt and parameters."""

    priority: int = 0
    timeout: float | None = None
    """Seconds from arrival after which the request ends with error code `deadline`."""
    cache_salt: str | None = None
    """Requests share cached prefixes only with requests of the same salt."""
    adapter: str | None = None
    labels: dict[str, str] = {}
    """Free words for scheduling policies."""


class PreparedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A user request ready for the engine: `samples` are its `params.n` engine requests, in order."""

    id: str
    prompt: str | None
    """The text, where there is one: as given, or the rendered chat."""
    prompt_token_ids: list[int]
    params: SamplingParams
    samples: list[EngineRequest]
    arrival_time: float


class InputProcessor:
    """Turns user input into engine requests. Thread-safe."""

    def __init__(self, spec: ResolvedSpec, tokenizer: Tokenizer, clock: Clock) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._clock = clock
        self._vocab_size = spec.model_config.vocab_size
        self._eos = tokenizer.eos_token_ids or spec.model_config.eos_token_ids
        self._counter = itertools.count()
        self._processors: dict[str, type[LogitsProcessor]] = {}

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str,
        options: RequestOptions | None = None,
        index: int | None = None,
        chat_options: Mapping[str, Any] | None = None,
    ) -> PreparedRequest:
        """Validate and tokenize one prompt. Raises `InvalidRequestError`, naming prompt `index` if given.

        `chat_options` reach the chat template (`add_generation_prompt`, …)."""
        try:
            return self._prepare(prompt, params, request_id, options or RequestOptions(), chat_options or {})
        except InvalidRequestError as error:
            if index is None:
                raise
            raise InvalidRequestError(f"prompt {index}: {error}", param=error.param, code=error.code) from error

    def _prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str,
        options: RequestOptions,
        chat_options: Mapping[str, Any],
    ) -> PreparedRequest:
        if not isinstance(params, SamplingParams | None):
            raise InvalidRequestError(f"params must be SamplingParams, not {type(params).__name__}")
        text, ids, salt = self._tokenize(prompt, chat_options)
        if salt is not None:
            options = msgspec.structs.replace(options, cache_salt=salt)
        _check_options(options)
        self._check_prompt(ids)
        params = self._complete(params or SamplingParams(), len(ids))
        now = self._clock.now()
        first = EngineRequest(
            id=request_id,
            prompt_token_ids=ids,
            params=params,
            arrival_time=now,
            seed=self._seed(params),
            priority=options.priority,
            deadline=None if options.timeout is None else now + options.timeout,
            cache_salt=options.cache_salt,
            adapter=options.adapter,
            eos_token_ids=self._eos,
            labels=options.labels,
        )
        return PreparedRequest(
            id=request_id,
            prompt=text,
            prompt_token_ids=ids,
            params=params,
            samples=_fan_out(first),
            arrival_time=now,
        )

    # ── Prompt ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _tokenize(self, prompt: Prompt, chat_options: Mapping[str, Any]) -> tuple[str | None, list[int], str | None]:
        """(text, ids, cache salt) of any form of prompt."""
        salt = None
        if isinstance(prompt, Mapping):
            prompt, salt = _open_mapping(prompt)
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequestError("the prompt is empty: give at least one character or token id")
            return prompt, self._tokenizer.encode(prompt), salt
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise InvalidRequestError(
                f"a prompt is a text, a list of token ids or a list of chat messages, not {type(prompt).__name__}"
            )
        messages = [dict(item) for item in prompt if isinstance(item, Mapping)]
        if messages and len(messages) == len(prompt):
            text = self._tokenizer.render_chat(messages, **chat_options)
            return text, self._tokenizer.encode(text, add_special_tokens=False), salt
        return None, self._check_ids("prompt_token_ids", prompt), salt

    def _check_ids(self, name: str, ids: Sequence[Any]) -> list[int]:
        for position, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int):
                raise InvalidRequestError(f"{name}[{position}] = {token!r} is not a token id (an integer)", param=name)
            if not 0 <= token < self._vocab_size:
                raise InvalidRequestError(
                    f"{name}[{position}] = {token} is outside the vocabulary: ids go from 0 to {self._vocab_size - 1}",
                    param=name,
                )
        return list(ids)

    def _check_prompt(self, ids: list[int]) -> None:
        limit = self._spec.max_model_len
        if not ids:
            raise InvalidRequestError("the prompt is empty: give at least one character or token id")
        if len(ids) >= limit:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens; {limit - 1} are allowed (max_model_len = {limit}, one of them to "
                "generate). Shorten the prompt or raise max_model_len",
                code="context_length_exceeded",
            )

    # ── Parameters ──────────────────────────────────────────────────────────────────────────────────────────────

    def _complete(self, params: SamplingParams, prompt_len: int) -> SamplingParams:
        """Check what depends on the model, and fill in what the user left to it."""
        for name in ("stop_token_ids", "allowed_token_ids"):
            self._check_ids(name, getattr(params, name) or ())
        self._check_ids("logit_bias", list(params.logit_bias or {}))
        for word in params.bad_words_token_ids:
            self._check_ids("bad_words_token_ids", word)
        for name, arguments in (params.logits_processors or {}).items():
            self._check_processor(name, arguments)
        room = self._spec.max_model_len - prompt_len
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens = {params.min_tokens} cannot be reached: after a prompt of {prompt_len} tokens there is "
                f"room for {room} (max_model_len = {self._spec.max_model_len})",
                param="min_tokens",
            )
        changes: dict[str, Any] = {}
        if max_tokens != params.max_tokens:
            changes["max_tokens"] = max_tokens
        if params.bad_words:
            changes["bad_words_token_ids"] = params.bad_words_token_ids + self._bad_words(params.bad_words)
        if params.prompt_logprobs is not None and not params.skip_reading_prefix_cache:
            changes["skip_reading_prefix_cache"] = True
        return msgspec.structs.replace(params, **changes) if changes else params

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences of each word as it reads at the start of a text and after a space."""
        spellings = (text for word in words for text in (word.lstrip() or word, " " + word.lstrip()))
        ids = (tuple(self._tokenizer.encode(text, add_special_tokens=False)) for text in spellings)
        return tuple(dict.fromkeys(sequence for sequence in ids if sequence))

    def _check_processor(self, name: str, arguments: dict[str, Any]) -> None:
        enabled = {component.name: component for component in self._spec.logits_processors}
        if name not in enabled:
            raise InvalidRequestError(
                f"logits processor '{name}' is not enabled.{did_you_mean(name, enabled)} Enabled: "
                f'{", ".join(sorted(enabled)) or "none"}. Enable it with logits_processors.use = ["{name}"]',
                param="logits_processors",
            )
        try:
            self._load(enabled[name]).Args(**arguments)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in ("logits_processors", name, *first["loc"]))
            raise InvalidRequestError(f"{key}: {first['msg']}", param=key) from error
        except TypeError as error:
            raise InvalidRequestError(f"logits_processors.{name}: {error}", param="logits_processors") from error

    def _load(self, component: Component) -> type[LogitsProcessor]:
        if component.name not in self._processors:
            self._processors[component.name] = component.load()
        return self._processors[component.name]

    def _seed(self, params: SamplingParams) -> int:
        """The user's; else derived from `settings.seed` and the request's number; else drawn by the system."""
        number = next(self._counter)
        if params.seed is not None:
            return params.seed
        if self._spec.seed is None:
            return secrets.randbits(63)
        digest = hashlib.blake2b(f"{self._spec.seed}:{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


def _open_mapping(prompt: Mapping[str, Any]) -> tuple[Any, str | None]:
    known = (*PROMPT_KEYS, "cache_salt")
    for key in prompt:
        if key not in known:
            raise InvalidRequestError(
                f"unknown prompt key '{key}'.{did_you_mean(str(key), known)} Allowed: {', '.join(known)}"
            )
    given = [key for key in PROMPT_KEYS if key in prompt]
    if len(given) != 1:
        raise InvalidRequestError(f"a prompt has exactly one of {', '.join(PROMPT_KEYS)}; given: {given or 'none'}")
    value = prompt[given[0]]
    if given[0] == "prompt":
        if not isinstance(value, str):
            raise InvalidRequestError(f"prompt must be a text, not {type(value).__name__}")
        return value, prompt.get("cache_salt")
    is_chat = given[0] == "messages"
    if not isinstance(value, list | tuple) or any(isinstance(item, Mapping) != is_chat for item in value):
        raise InvalidRequestError(f"{given[0]} must be a list of {'chat messages' if is_chat else 'token ids'}")
    return value, prompt.get("cache_salt")


def _check_options(options: RequestOptions) -> None:
    if isinstance(options.priority, bool) or not isinstance(options.priority, int):
        raise InvalidRequestError(f"priority = {options.priority!r} is not an integer (lower runs earlier)")
    if options.timeout is not None and not (isinstance(options.timeout, (int, float)) and options.timeout > 0):
        raise InvalidRequestError(f"timeout = {options.timeout!r} is not allowed: it must be seconds above 0, or None")
    if options.cache_salt is not None and not (isinstance(options.cache_salt, str) and options.cache_salt):
        raise InvalidRequestError(
            f"cache_salt = {options.cache_salt!r} is not allowed: it must be a non-empty text, or None"
        )
    labels_fit = isinstance(options.labels, dict) and all(
        isinstance(key, str) and isinstance(value, str) for key, value in options.labels.items()
    )
    if not labels_fit or len(options.labels) > MAX_LABELS:
        raise InvalidRequestError(f"labels must be at most {MAX_LABELS} pairs of texts")


def _fan_out(first: EngineRequest) -> list[EngineRequest]:
    """The `n` engine requests of a user request: siblings of one group, told apart by `sample_index`.

    Only the first computes `prompt_logprobs`: they are the same for all."""
    n = first.params.n
    if n == 1:
        return [first]
    later = first.params
    if later.prompt_logprobs is not None:
        later = msgspec.structs.replace(later, prompt_logprobs=None, skip_reading_prefix_cache=False)
    return [
        msgspec.structs.replace(
            first, id=f"{first.id}-{i}", group=first.id, sample_index=i, params=later if i else first.params
        )
        for i in range(n)
    ]

"""`SamplingParams`: how one request wants its tokens chosen, validated when it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from interlace.errors import InvalidRequestError, did_you_mean

MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_LOGPROBS = 20


class SamplingParams(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Sampling parameters of one request, under the field's usual names.

    Raises `InvalidRequestError` naming the field, the value and the allowed range. Order of effect: logit bias,
    allowed tokens, bad words, min_tokens, penalties, custom logits processors, then (unless greedy) temperature,
    min_p, top_k, top_p. `logprobs` are of the raw model distribution, before any of these.
    """

    n: int = 1
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    """Same seed, same prompt, same parameters: same tokens, whatever else is in the batch."""
    stop: str | Sequence[str] | None = ()
    """Strings that end the text; cut off from it unless `include_stop_str_in_output`."""
    stop_token_ids: Sequence[int] | None = ()
    """Tokens that end the request; kept in `token_ids`."""
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: up to `max_model_len`. More than fit beside the prompt is as many as fit."""
    min_tokens: int = 0
    logprobs: int | None = None
    """Number of most likely tokens to report beside the chosen one; 0 reports only the chosen one."""
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """Filled by the front from `bad_words`; may be given directly as token sequences."""
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    skip_reading_prefix_cache: bool = False
    """Do not use cached prefixes (set implied by `prompt_logprobs`, which needs every position computed)."""
    logits_processors: dict[str, dict[str, Any]] | None = None
    """Enabled logits processors to apply, by name, each with its own typed arguments."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamplingParams:
        """Like the constructor, with the nearest match named for an unknown key."""
        for key in values:
            if key not in cls.__struct_fields__:
                hint = did_you_mean(key, cls.__struct_fields__)
                raise InvalidRequestError(f"unknown sampling parameter '{key}'.{hint}")
        return cls(**values)

    def __post_init__(self) -> None:
        """Normalise sequences to tuples (by `force_setattr`: the struct is frozen for everyone else) and validate."""
        _normalise(self)
        _validate(self)


def _normalise(params: SamplingParams) -> None:
    force = msgspec.structs.force_setattr
    for name in ("stop", "stop_token_ids", "bad_words"):
        value = getattr(params, name)
        value = (value,) if isinstance(value, str) else () if value is None else value
        if not isinstance(value, (list, tuple)):
            raise _bad(name, value, "a list")
        force(params, name, tuple(value))
    if params.allowed_token_ids is not None:
        force(params, "allowed_token_ids", tuple(params.allowed_token_ids))
    force(params, "bad_words_token_ids", tuple(tuple(word) for word in params.bad_words_token_ids))


def _bad(name: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} = {value!r} is not allowed: it must be {allowed}", param=name)


def _number(params: SamplingParams, name: str, low: float, high: float, allowed: str) -> None:
    value = getattr(params, name)
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high:
        raise _bad(name, value, allowed)


def _integer(params: SamplingParams, name: str, low: int, high: int | None, optional: bool = False) -> None:
    value = getattr(params, name)
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        span = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise _bad(name, value, span + (" or None" if optional else ""))


def _token_ids(name: str, ids: Sequence[int]) -> None:
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise _bad(name, token, "a list of token ids (integers of at least 0)")


def _validate(params: SamplingParams) -> None:
    _integer(params, "n", 1, MAX_N)
    _number(params, "temperature", 0.0, 100.0, "a number from 0 (greedy) to 100")
    _number(params, "top_p", 0.0, 1.0, "a number above 0 and up to 1")
    if params.top_p == 0.0:
        raise _bad("top_p", params.top_p, "a number above 0 and up to 1")
    _integer(params, "top_k", -1, None)
    _number(params, "min_p", 0.0, 1.0, "a number from 0 to 1")
    _number(params, "presence_penalty", -2.0, 2.0, "a number from -2 to 2")
    _number(params, "frequency_penalty", -2.0, 2.0, "a number from -2 to 2")
    _number(params, "repetition_penalty", 1e-6, 100.0, "a number above 0 and up to 100")
    _integer(params, "seed", -(2**63), 2**63 - 1, optional=True)
    _integer(params, "max_tokens", 1, None, optional=True)
    _integer(params, "min_tokens", 0, None)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise _bad("min_tokens", params.min_tokens, f"at most max_tokens ({params.max_tokens})")
    _integer(params, "logprobs", 0, MAX_LOGPROBS, optional=True)
    _integer(params, "prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
    stop: Sequence[str] = params.stop or ()
    if len(stop) > MAX_STOP_STRINGS or not all(isinstance(s, str) and s for s in stop):
        raise _bad("stop", list(stop), f"at most {MAX_STOP_STRINGS} non-empty strings")
    if stop and not params.detokenize:
        raise _bad("stop", list(stop), "empty when detokenize is False: stop strings need text")
    if not all(isinstance(word, str) and word for word in params.bad_words or ()):
        raise _bad("bad_words", params.bad_words, "a list of non-empty strings")
    for sequence in params.bad_words_token_ids:
        if not sequence:
            raise _bad("bad_words_token_ids", params.bad_words_token_ids, "a list of non-empty token sequences")
        _token_ids("bad_words_token_ids", sequence)
    _token_ids("stop_token_ids", params.stop_token_ids or ())
    for token, value in (params.logit_bias or {}).items():
        if not isinstance(value, (int, float)) or not -100 <= value <= 100:
            raise _bad(f"logit_bias[{token}]", value, "a number from -100 to 100")
    _token_ids("logit_bias", list(params.logit_bias or {}))
    if params.allowed_token_ids is not None:
        if not params.allowed_token_ids:
            raise _bad("allowed_token_ids", [], "a non-empty list, or None")
        _token_ids("allowed_token_ids", params.allowed_token_ids)
    for name, arguments in (params.logits_processors or {}).items():
        if not isinstance(arguments, dict):
            raise _bad(f"logits_processors[{name!r}]", arguments, "a dict of that processor's arguments")

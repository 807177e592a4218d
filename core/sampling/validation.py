"""Checks of sampling parameters that need to know the model or the enabled plugins. No torch.

The front calls these before a request is accepted; the sampler relies on them, and fails only the request where it
was not done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from interlace.errors import InvalidRequestError, did_you_mean
from interlace.interfaces.logits_processor import LogitsProcessor
from interlace.sampling.params import SamplingParams


def validate_processor_args(
    processors: Mapping[str, type[LogitsProcessor]], params: SamplingParams
) -> dict[str, BaseModel]:
    """Parse the arguments of every logits processor that `params` names.

    Args:
        processors: the enabled processors, name → class.

    Returns:
        Name → validated instance of the class's `Args`.

    Raises:
        InvalidRequestError: a name is not enabled, or its arguments do not fit.
    """
    return {
        name: parse_processor_args(name, _enabled(processors, name), arguments)
        for name, arguments in (params.logits_processors or {}).items()
    }


def parse_processor_args(name: str, processor: type[LogitsProcessor], arguments: dict[str, Any]) -> BaseModel:
    """The validated `Args` of one processor; `InvalidRequestError` names the argument, its value and the reason."""
    try:
        return processor.Args.model_validate(arguments)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        hint = ""
        if first["type"] == "extra_forbidden":
            fields = processor.Args.model_fields
            hint = f" Allowed: {', '.join(sorted(fields)) or 'no arguments'}.{did_you_mean(key, fields)}"
        where = f"logits_processors[{name!r}]" + (f".{key} = {first['input']!r}" if key else f" = {arguments!r}")
        raise InvalidRequestError(f"{where} is not allowed: {first['msg']}.{hint}") from error


def validate_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse token ids that the model does not have.

    `stop_token_ids` may lie outside: a token that is never produced is harmless there.

    Raises:
        InvalidRequestError: naming the parameter, the id and the allowed range.
    """
    _in_vocabulary("logit_bias", params.logit_bias or (), vocab_size)
    _in_vocabulary("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    for sequence in params.bad_words_token_ids:
        _in_vocabulary("bad_words_token_ids", sequence, vocab_size)


def _enabled(processors: Mapping[str, type[LogitsProcessor]], name: str) -> type[LogitsProcessor]:
    if name not in processors:
        enabled = ", ".join(sorted(processors)) or "none"
        raise InvalidRequestError(
            f"logits processor '{name}' is not enabled (enabled: {enabled}).{did_you_mean(name, processors)} "
            f"Add it to logits_processors.use in the configuration."
        )
    return processors[name]


def _in_vocabulary(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"{field} contains token id {token}, which the model does not have: ids are 0 to {vocab_size - 1}"
            )

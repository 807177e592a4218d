"""From the bytes of a request to a checked request object; whatever is wrong with them is an `ApiError`.

Nothing is ignored in silence: a parameter that is not known is refused with the nearest one that is, and one that is
known in the field but not supported here is refused with these words, unless its value asks for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from interlace.errors import did_you_mean
from interlace.server.errors import ApiError

MAX_DEPTH = 64
"""Levels of lists and objects within each other."""
INT64 = 2**63
MAX_SHOWN = 80
"""Characters of a wrong value that an error repeats."""


class Body(BaseModel):
    """An object in a request. Types are strict (`"1"` is no number); null means the default."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Parameters of the field that we do not have → values that ask for nothing, and pass."""


B = TypeVar("B", bound=Body)


async def read_json(request: Request) -> Any:
    """The decoded body. Raises `ApiError` 415 or 400."""
    # Also a matter of safety: pages of other sites may not send this type without being asked for permission first.
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"the content type is {given!r}; send the header 'Content-Type: application/json'")
    return decode_json(await request.body())


def decode_json(data: bytes | str) -> Any:
    """Plain data. Raises `ApiError` 400 for what is not JSON, nested too deeply, or has numbers nobody can hold."""
    try:
        value = msgspec.json.decode(data)
    except UnicodeDecodeError as error:
        raise _invalid(f"the body is not UTF-8: {error.reason}") from error
    except msgspec.DecodeError as error:
        raise _invalid(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise _invalid(f"the body is nested too deeply: at most {MAX_DEPTH} levels are allowed") from error
    _check_plain(value)
    return value


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


def _check_plain(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if type(item) is dict:
                below += item.values()
            elif type(item) is list:
                below += item
            elif type(item) is int and not -INT64 <= item < INT64:
                raise _invalid("the body has an integer beyond 64 bits")
        if not below:
            return
        level = below
    raise _invalid(f"the body is nested too deeply: at most {MAX_DEPTH} levels are allowed")


def parse(model: type[B], body: Any, where: str = "") -> B:
    """`body` as a `model`. `where` is the path of `body` within the request, for errors. Raises `ApiError` 400."""
    if not isinstance(body, Mapping):
        what = where.rstrip(".") or "the body"
        raise ApiError(400, f"{what} must be a JSON object, not {_kind(body)}", param=where.rstrip(".") or None)
    given = {}
    for key, value in body.items():
        if key not in model.model_fields:
            _check_foreign(model, key, value, where)
        elif value is not None:
            given[key] = value
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _describe(error, given, where) from None


def _check_foreign(model: type[Body], key: str, value: Any, where: str) -> None:
    param = where + key
    if key in model.UNSUPPORTED:
        harmless = model.UNSUPPORTED[key]
        if value is None or any(type(value) is type(other) and value == other for other in harmless):
            return
        allowed = f" (only {', '.join(_show(other) for other in harmless)})" if harmless else ""
        raise ApiError(
            400,
            f"'{param}' = {_show(value)} is not supported by this server yet{allowed}",
            param=param,
            code="unsupported_parameter",
        )
    hint = did_you_mean(key, model.model_fields)
    raise ApiError(400, f"unknown parameter '{param[:MAX_SHOWN]}'.{hint}", param=param, code="unknown_parameter")


def _describe(error: ValidationError, given: dict[str, Any], where: str) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    path = [str(part) for part in first["loc"]]
    # Beyond the name of a field, pydantic's paths have names of types in them.
    param = where + (path[0] if path else "")
    if first["type"] == "missing":
        return ApiError(400, f"'{param}' is missing", param=param, code="missing_required_parameter")
    value = given.get(path[0]) if path else given
    return ApiError(400, f"{param} = {_show(value)} is not allowed: {first['msg']}", param=param, code="invalid_type")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _show(value: Any) -> str:
    if isinstance(value, list | dict) and len(value) > 8:
        return _kind(value)
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"

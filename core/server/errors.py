"""Error objects in the form OpenAI clients expect, and which status each error of Interlace has."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from interlace.errors import (
    EngineDeadError,
    EngineRestartingError,
    InterlaceError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
)

INVALID, OVERLOADED, TIMEOUT, SERVER = "invalid_request_error", "overloaded_error", "timeout_error", "server_error"
"""Values of `error.type`."""
FAILURES = {
    "deadline": (504, TIMEOUT, "timeout"),
    "kv_capacity": (400, INVALID, "kv_capacity"),
    "rejected": (503, OVERLOADED, "rejected"),
}
"""Code of a `RequestFailedError` → status, type and code of the answer; any other is 500."""
CLIENT_LEFT = 499
"""As nginx has it. Nobody reads it but the log."""


class ApiError(Exception):
    """An answer other than the one asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        """The field of the request at fault, as a path: `messages.0.role`."""
        self.headers = headers or {}

    @property
    def content(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


def error_response(status: int, message: str, type: str, code: str | None, param: str | None = None) -> JSONResponse:
    """The answer `{"error": {message, type, param, code}}`."""
    return ApiError(status, message, type=type, code=code, param=param).response


def describe(error: Exception) -> ApiError:
    """What a client is told of any exception. Those that are no fault of anyone outside stay vague."""
    match error:
        case ApiError():
            return error
        case InvalidRequestError():
            return ApiError(400, str(error), code=error.code, param=error.param)
        case OverloadedError():
            return ApiError(503, str(error), type=OVERLOADED, code="overloaded", headers=_retry_after(1))
        case RequestFailedError():
            status, type, code = FAILURES.get(error.code, (500, SERVER, error.code))
            return ApiError(status, str(error), type=type, code=code, headers=_retry_after(1) if status == 503 else {})
        case EngineRestartingError():
            headers = _retry_after(error.retry_after)
            return ApiError(503, str(error), type=SERVER, code="engine_restarting", headers=headers)
        case EngineDeadError():
            return ApiError(503, str(error), type=SERVER, code="engine_dead")
        case InterlaceError():
            return ApiError(500, str(error), type=SERVER)
        case RecursionError():
            return ApiError(400, "the request is nested too deeply", code="invalid_json")
        case RequestValidationError():
            return _describe_validation(error)
        case HTTPException():
            return _describe_http(error)
    return ApiError(500, "internal error; the server's log has it", type=SERVER, code="internal_error")


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def _describe_validation(error: RequestValidationError) -> ApiError:
    """Of parameters in paths and queries; bodies are checked by `interlace.server.bodies`."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])
    return ApiError(400, f"{name}: {first['msg']}", param=name or None)


def _describe_http(error: HTTPException) -> ApiError:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    type = INVALID if error.status_code < 500 else SERVER
    return ApiError(error.status_code, str(error.detail), type=type, code=code, headers=dict(error.headers or {}))


def install(app: FastAPI) -> None:
    """Let every error of `app` be answered with an error object."""

    async def known(_: Request, error: Exception) -> Response:
        return describe(error).response

    async def nowhere(request: Request, error: Exception) -> Response:
        """The router's own words, `Not Found`, help nobody."""
        found = describe(error)
        if isinstance(error, HTTPException) and error.detail == HTTPStatus(error.status_code).phrase:
            asked = f"{request.method} {request.url.path}"
            allowed = found.headers.get("allow") or found.headers.get("Allow")
            why = (
                f"{asked} is not allowed; allowed: {allowed}" if allowed else f"there is no {asked}; see /openapi.json"
            )
            found = ApiError(found.status, why, type=found.type, code=found.code, headers=found.headers)
        return found.response

    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)

    for kind in (ApiError, InterlaceError, RecursionError, RequestValidationError, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, nowhere)
    app.add_exception_handler(ClientDisconnect, left)

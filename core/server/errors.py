"""Error objects in the form OpenAI clients expect."""

from __future__ import annotations

from starlette.responses import JSONResponse


def error_response(status: int, message: str, type: str, code: str | None, param: str | None = None) -> JSONResponse:
    """The answer `{"error": {message, type, param, code}}`."""
    return JSONResponse({"error": {"message": message, "type": type, "param": param, "code": code}}, status_code=status)

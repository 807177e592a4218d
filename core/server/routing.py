"""Between HTTP and the services: bodies in, answers out, and the OpenAPI description of both."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

import msgspec
from fastapi import FastAPI, Request
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from interlace.server import answers, requests
from interlace.server.bodies import read_json
from interlace.server.generation import Caller
from interlace.server.sse import EventStream, until_disconnect
from interlace.server.state import ServerState

REF = "#/components/schemas/"
REQUESTS: Sequence[type[BaseModel]] = (
    requests.ChatRequest,
    requests.CompletionRequest,
    requests.TokenizeRequest,
    requests.TokenizeChatRequest,
    requests.DetokenizeRequest,
    requests.StreamOptions,
    requests.ChatMessage,
)
ANSWERS: Sequence[type[msgspec.Struct]] = (
    answers.ChatCompletion,
    answers.ChatChunk,
    answers.Completion,
    answers.ModelList,
    answers.Version,
    answers.Tokens,
    answers.Text,
    answers.ErrorObject,
)


class Job(Protocol):
    """One checked request, as services make it."""

    stream: bool

    async def answer(self) -> msgspec.Struct: ...

    def events(self) -> AsyncGenerator[bytes, None]: ...


class Service(Protocol):
    """What answers one kind of request."""

    def prepare(self, body: Any, caller: Caller) -> Job: ...


def json_answer(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def respond(state: ServerState, service: Service, request: Request) -> Response:
    """Answer a generation request, for as long as its client waits."""
    body = await read_json(request)
    known = request.scope.get("state", {})
    job = service.prepare(body, Caller(known.get("request_id"), known.get("key_salt")))
    if job.stream:
        return EventStream(job.events(), state.settings.sse_keep_alive_s, state.llm.front.clock)
    return json_answer(await until_disconnect(request.receive, job.answer()))


# ── OpenAPI ─────────────────────────────────────────────────────────────────────────────────────────────────────


def takes(*models: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is one of `models`."""
    refs = [{"$ref": REF + model.__name__} for model in models]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def returns(answer: type[msgspec.Struct], chunk: type[msgspec.Struct] | None = None) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route; `chunk`: what the events of its streams are."""
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": REF + answer.__name__}}}
    if chunk is not None:
        text = f"With `stream`: events whose data are `{chunk.__name__}` objects, at last `[DONE]`."
        # No type: some readers apply the schema to the whole stream, others to each event.
        content["text/event-stream"] = {"schema": {"description": text}}
    failed = {"application/json": {"schema": {"$ref": REF + "ErrorObject"}}}
    return {
        200: {"description": "The answer", "content": content},
        "default": {"description": "What went wrong", "content": failed},
    }


def describe_schemas(app: FastAPI) -> None:
    """Put the schemas of requests and answers into `/openapi.json`, and leave FastAPI's own errors out."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = generate()
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            _, found = models_json_schema([(model, "validation") for model in REQUESTS], ref_template=REF + "{model}")
            components.update(found["$defs"])
            components.update(msgspec.json.schema_components(ANSWERS, ref_template=REF + "{name}")[1])
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                components.pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI documents

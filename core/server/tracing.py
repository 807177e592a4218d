"""OpenTelemetry traces: one span per API request, with the attributes of the `gen_ai` semantic conventions.

Times inside the request (`gen_ai.latency.…`) are in seconds, under the names that other engines use for them.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from interlace.engine.front import Observer
from interlace.engine.output_state import ActiveRequest
from interlace.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from interlace.server.state import ServerState

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
"""Path → `gen_ai.operation.name`."""
NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
EXPORT_TIMEOUT = 5.0
"""Seconds for the collector to take a batch; spans that it does not take are dropped."""


def check(endpoint: str | None) -> None:
    """Raise `ConfigError` if traces are wanted (`server.otlp_endpoint`) and cannot be sent."""
    if endpoint is None:
        return
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise ConfigError(
            f"server.otlp_endpoint is '{endpoint}': should be the URL of an OTLP/HTTP collector such as "
            "http://localhost:4318"
        )
    try:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    except ModuleNotFoundError as error:  # of a package above
        missing = [error.name or str(error)]
    if missing:
        raise ConfigError(
            f"server.otlp_endpoint is set, but {missing[0]} is not installed: pip install 'interlace[otel]'"
        )


def traces_url(endpoint: str) -> str:
    """The address of a collector's traces: an endpoint without path stands for all its signals."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"


def install(app: FastAPI, state: ServerState) -> None:
    """Trace the API requests of `app` to `server.otlp_endpoint`, if that is set."""
    endpoint = state.settings.otlp_endpoint
    check(endpoint)
    if endpoint is None:
        return
    collected = CollectedRequests()
    state.llm.front.observe(collected)
    app.add_middleware(
        TraceRequests, provider=make_provider(endpoint), collected=collected, model_name=state.model_names[0]
    )


def make_provider(endpoint: str) -> TracerProvider:
    """Spans of it go to the collector in batches, from a thread."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    import interlace

    resource = Resource.create({"service.name": "interlace", "service.version": interlace.__version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(traces_url(endpoint), timeout=EXPORT_TIMEOUT)))
    return provider


class CollectedRequests(Observer):
    """Tells which engine requests were submitted in the course of an API request, whatever ids they got."""

    def __init__(self) -> None:
        self._current: ContextVar[list[ActiveRequest] | None] = ContextVar("collected", default=None)

    def begin(self) -> list[ActiveRequest]:
        """A list that takes what is submitted from now on in this context and in tasks begun in it."""
        requests: list[ActiveRequest] = []
        self._current.set(requests)
        return requests

    def on_submit(self, requests: list[ActiveRequest]) -> None:
        current = self._current.get()
        if current is not None:
            current += requests


class _Named(msgspec.Struct):
    model: str = ""


class TraceRequests:
    """ASGI middleware: a span from the first byte of an API request to the last of its answer. A `traceparent` header
    (W3C) makes it part of the client's trace."""

    def __init__(self, app: ASGIApp, provider: TracerProvider, collected: CollectedRequests, model_name: str) -> None:
        self._app = app
        self._provider = provider
        self._tracer = provider.get_tracer("interlace.server")
        self._collected = collected
        self._model_name = model_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._closing(send))
        elif scope["type"] == "http" and scope["method"] == "POST" and _path(scope) in OPERATIONS:
            await self._trace(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _closing(self, send: Send) -> Send:
        async def forward(message: Message) -> None:
            if message["type"] == "lifespan.shutdown.complete":
                await asyncio.to_thread(self._provider.shutdown)  # sends what is left
            await send(message)

        return forward

    async def _trace(self, scope: Scope, receive: Receive, send: Send) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        path = _path(scope)
        operation = OPERATIONS[path]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parent = TraceContextTextMapPropagator().extract(headers)
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "interlace",
            "http.request.method": "POST",
            "http.route": path,
        }
        name = f"{operation} {self._model_name}"
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes=attributes)
        requests = self._collected.begin()

        async def incoming() -> Message:
            message = await receive()
            if message["type"] == "http.request" and (model := _model(message.get("body", b""))):
                span.set_attribute("gen_ai.request.model", model)
            return message

        async def outgoing(message: Message) -> None:
            if message["type"] == "http.response.start":
                _set_status(span, message["status"])
            await send(message)

        try:
            await self._app(scope, incoming, outgoing)
        finally:
            span.set_attributes(describe(requests, self._model_name))
            span.end()


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if root else path


def _model(body: bytes) -> str:
    """The field `model` of a request, without reading the rest; empty if there is none."""
    try:
        return msgspec.json.decode(body, type=_Named).model
    except (msgspec.DecodeError, RecursionError):
        return ""


def _set_status(span: Span, status: int) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_attribute("error.type", str(status))
        span.set_status(StatusCode.ERROR)


def describe(requests: list[ActiveRequest], model_name: str) -> dict[str, Any]:
    """Attributes of an API request by what it submitted (several prompts make several requests); none if nothing."""
    if not requests:
        return {}
    first = requests[0]
    params = first.params
    metrics = [request.metrics for request in requests]
    found: dict[str, Any] = {
        "gen_ai.response.model": model_name,
        "gen_ai.response.id": first.id,
        "gen_ai.response.finish_reasons": [
            sample.finish_reason or "abort" for request in requests for sample in request.samples
        ],
        "gen_ai.request.choice.count": params.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.stop_sequences": list(params.stop or ()) or None,
        "gen_ai.usage.input_tokens": sum(request.num_prompt_tokens for request in requests),
        "gen_ai.usage.output_tokens": sum(request.num_output_tokens for request in requests),
        "gen_ai.usage.cache_read.input_tokens": sum(request.cached_tokens or 0 for request in requests),
        # Of several prompts, the one that came last decides.
        "gen_ai.latency.time_to_first_token": _longest(one.ttft for one in metrics),
        "gen_ai.latency.time_in_queue": _longest(one.queue_time for one in metrics),
        "gen_ai.latency.time_in_model_prefill": _longest(one.prefill_time for one in metrics),
        "gen_ai.latency.time_in_model_decode": _longest(one.decode_time for one in metrics),
        "gen_ai.latency.time_in_model_inference": _longest(one.inference_time for one in metrics),
        "gen_ai.latency.e2e": _longest(one.e2e_latency for one in metrics),
    }
    return {name: value for name, value in found.items() if value is not None}


def _longest(times: Iterable[float | None]) -> float | None:
    return max((seconds for seconds in times if seconds is not None), default=None)

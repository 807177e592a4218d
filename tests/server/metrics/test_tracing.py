"""Traces reach a real OTLP/HTTP collector, with the attributes of the conventions, as part of the client's trace."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from interlace.errors import ConfigError
from interlace.server import tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Keeps the spans it is sent."""

    def __init__(self):
        self.spans, self.paths, self.resources = [], [], []
        self.arrived = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(self.path, ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, path, export):
        with self.arrived:
            self.paths.append(path)
            for resource in export.resource_spans:
                self.resources.append(attributes(resource.resource))
                for scope in resource.scope_spans:
                    self.spans.extend(scope.spans)
            self.arrived.notify_all()

    def wait_for(self, count):
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.spans) >= count, 60), f"{len(self.spans)} spans came"
            return self.spans[:count]


def attributes(holder):
    def value(any_value):
        kind = any_value.WhichOneof("value")
        if kind == "array_value":
            return [value(one) for one in any_value.array_value.values]
        return getattr(any_value, kind)

    return {pair.key: value(pair.value) for pair in holder.attributes}


@pytest.fixture(scope="module")
def collector():
    found = Collector()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.mark.slow
def test_spans_of_api_requests(serving, collector):
    body = {"model": "alias/of-it", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0.5}
    body |= {"max_tokens": 6, "stop": ["\n\n\n"], "seed": 7, "ignore_eos": True}
    with serving(server={"otlp_endpoint": collector.url}) as running, httpx.Client(base_url=running.url) as client:
        client.timeout = 120
        sent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        chat = client.post("/v1/chat/completions", json=body, headers=sent).json()
        several = {"model": "smollm2", "prompt": ["One", "Two"], "max_tokens": 3, "n": 2, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=several | {"stream": True}) as stream:
            assert "[DONE]" in stream.read().decode()
        assert client.post("/v1/completions", json={"model": "nobody", "prompt": "x"}).status_code == 404
        assert client.get("/v1/models").status_code == 200
    spans = collector.wait_for(3)  # what was left is sent when the server stops
    first, second, third = sorted(spans, key=lambda span: span.start_time_unix_nano)
    assert len(collector.spans) == 3
    assert set(collector.paths) == {"/v1/traces"} and collector.resources[0]["service.name"] == "interlace"

    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert second.trace_id.hex() != TRACE and not second.parent_span_id
    assert first.name == "chat smollm2" and second.name == "text_completion smollm2"
    found = attributes(first)
    times = {name: found.pop(name) for name in list(found) if name.startswith("gen_ai.latency.")}
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "interlace",
        "gen_ai.request.model": "alias/of-it",
        "gen_ai.response.model": "smollm2",
        "gen_ai.response.id": found["gen_ai.response.id"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": found["gen_ai.request.top_k"],
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stop_sequences": ["\n\n\n"],
        "gen_ai.usage.input_tokens": chat["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    length = (first.end_time_unix_nano - first.start_time_unix_nano) / 1e9
    parts = ("time_in_queue", "time_in_model_prefill", "time_in_model_decode")
    assert all(times[f"gen_ai.latency.{part}"] >= 0 for part in parts)
    assert sum(times[f"gen_ai.latency.{part}"] for part in parts) <= times["gen_ai.latency.e2e"] + 1e-6 <= length + 1e-3
    found = attributes(second)
    assert found["gen_ai.usage.output_tokens"] == 12 and found["gen_ai.usage.input_tokens"] >= 2
    assert found["gen_ai.response.finish_reasons"] == ["length"] * 4
    refused = attributes(third)
    assert refused["http.response.status_code"] == 404 and refused["gen_ai.request.model"] == "nobody"
    assert "gen_ai.usage.output_tokens" not in refused


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://collector/otlp/v1/traces", "https://collector/otlp/v1/traces"),
    ],
)
def test_where_traces_go(endpoint, url):
    assert tracing.traces_url(endpoint) == url


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://collector:4317", "http://"])
def test_an_endpoint_that_is_none(endpoint):
    with pytest.raises(ConfigError, match=r"server\.otlp_endpoint"):
        tracing.check(endpoint)


def test_without_the_extra_the_start_fails_and_says_what_to_install(monkeypatch):
    find = tracing.importlib.util.find_spec
    monkeypatch.setattr(
        tracing.importlib.util, "find_spec", lambda name: None if "otlp" in name else find(name), raising=True
    )
    with pytest.raises(ConfigError, match=r"opentelemetry.exporter.*pip install 'interlace\[otel\]'"):
        tracing.check("http://localhost:4318")
    tracing.check(None)

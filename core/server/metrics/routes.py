"""`/metrics`, and how the counting is attached to an application."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI, Request, Response
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics

from interlace.server.metrics.exposition import EngineCollector, make_registry
from interlace.server.metrics.http import HttpTotals
from interlace.server.metrics.totals import TotalsByEngine
from interlace.server.state import ServerState


def install(app: FastAPI, state: ServerState) -> None:
    """Count engine traffic from now on, and serve the counts at `/metrics`. HTTP traffic is counted by whoever puts
    `CountRequests` around everything; it feeds `app.state.http_totals`."""
    front = state.llm.front
    engines, http = TotalsByEngine(len(front.infos)), HttpTotals()
    front.observe(engines)
    registry = make_registry(EngineCollector(front, engines.engines, http, state.model_names[0], state.settings))
    app.state.http_totals = http

    # Not a coroutine: it may wait for the engine loop, so it runs in a thread.
    @app.get("/metrics", tags=["operation"], summary="Prometheus metrics", response_class=Response)
    def metrics(request: Request) -> Response:
        """Everything this server counts, as Prometheus text or, where the client accepts it, OpenMetrics."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        if content_type.startswith("application/openmetrics-text"):
            # Our names need no escaping, and that of the library (0.26) would make `vllm_…` of `vllm:…`.
            encode = partial(openmetrics.generate_latest, escaping=openmetrics.ALLOWUTF8)
        return Response(encode(registry), media_type=None, headers={"content-type": content_type})

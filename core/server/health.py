"""`/health`, `/ready`, `/load` and `/health/generate`: what load balancers and operators ask."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from interlace.engine.client import EngineHealth
from interlace.errors import InterlaceError
from interlace.messages import SamplingParams
from interlace.server.state import ServerState

WORKING = ("ok", "degraded")
GENERATE_TIMEOUT = 20.0
"""Seconds within which `/health/generate` must have its token."""
FIRST = -(2**31)
"""The priority of its request: before any other, under policies that have priorities."""


def router(state: ServerState) -> APIRouter:
    """Health routes of one server. While a drain goes on, `Guard` answers in place of all but `/health` and `/load`."""
    routes = APIRouter(tags=["health"])
    probe = HealthProbe(state)

    @routes.get("/health", summary="Ask the engine loop how it is")
    async def health(request: Request) -> JSONResponse:
        """200 while the engine works, if only just (`degraded`); 503 while it is `restarting` or `dead`."""
        found = await probe.ask()
        answer = msgspec.to_builtins(found)
        if not request.scope.get("state", {}).get("trusted", True):
            # Without a key one is told how the engine is, not why: reasons name requests, files and plugins.
            answer = {"status": found.status}
        return JSONResponse(answer, status_code=200 if found.status in WORKING else 503)

    @routes.get("/ready", summary="Whether requests may be sent here")
    async def ready() -> JSONResponse:
        """200 if a request sent now would be taken, else 503."""
        found = await probe.ask()
        able = found.status in WORKING
        return JSONResponse({"ready": able, "status": found.status}, status_code=200 if able else 503)

    @routes.get("/load", summary="How many requests run and wait")
    async def load() -> dict[str, Any]:
        """Counted in samples: a request with `n` answers is `n` of them. `server_load` is their sum."""
        front = state.llm.front
        waiting, active = front.num_waiting, front.num_active
        limits = {"max_waiting": state.settings.max_waiting}
        return {"server_load": active, "running": active - waiting, "waiting": waiting, **limits}

    @routes.get("/health/generate", summary="Generate a token")
    async def health_generate() -> JSONResponse:
        """200 if the model generated a token within 20 seconds, else 503: the whole path of a request is tried."""
        return await probe.generate()

    return routes


class HealthProbe:
    """Asks the engine; however many clients ask at the same time, it is asked once."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._asking: asyncio.Task[EngineHealth] | None = None

    async def ask(self) -> EngineHealth:
        """What the engine loop says about itself."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._state.llm.health())
        return await asyncio.shield(self._asking)

    async def generate(self) -> JSONResponse:
        """Generate one token and say how long it took."""
        llm = self._state.llm
        clock = llm.front.clock
        began = clock.now()
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        try:
            async with asyncio.timeout(GENERATE_TIMEOUT):
                tokens = [
                    token
                    async for output in llm.generate([self._token()], params, priority=FIRST, timeout=GENERATE_TIMEOUT)
                    for token in output.outputs[0].token_ids
                ]
        except (InterlaceError, TimeoutError) as error:
            reason = str(error) or f"no token within {GENERATE_TIMEOUT:g} s"
            return JSONResponse({"status": "failed", "reason": reason}, status_code=503)
        seconds = round(clock.now() - began, 4)
        return JSONResponse({"status": "ok", "tokens": len(tokens), "seconds": seconds})

    def _token(self) -> int:
        return next(iter(self._state.llm.front.tokenizer.eos_token_ids), 0)

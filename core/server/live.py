"""`/live`: the engine as the page shows it, and the page itself.

The engine is asked at most once per interval however many pages are open, and not at all while none is.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Response
from fastapi.staticfiles import StaticFiles

import interlace
from interlace.engine.front import Observer
from interlace.engine.output_processor import Processed
from interlace.engine.snapshot import EngineSnapshot
from interlace.errors import EngineDeadError
from interlace.messages import StepOutput
from interlace.server.state import ServerState

INTERVAL = 1.0
"""Seconds between two looks at the engine."""
PATIENCE = 1.0
"""Seconds to wait for an engine in a long step before the last look is shown again."""
HISTORY = 120
"""Seconds that the sparklines go back."""
MAX_SHOWN = 64
"""Requests that are listed, running and waiting each."""
PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class Second(msgspec.Struct):
    """What happened within one second."""

    number: int
    """The second, in `Clock.now()` seconds."""
    output: int = 0
    prefill: int = 0
    ttft: float = 0.0
    started: int = 0
    gaps: float = 0.0
    gap_count: int = 0


class History(Observer):
    """The last `HISTORY` seconds, one entry for each in which anything happened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: deque[Second] = deque(maxlen=HISTORY + 2)

    def on_step(self, step: StepOutput, done: Processed) -> None:
        number = int(step.now)
        with self._lock:
            if not self._seconds or self._seconds[-1].number != number:
                self._seconds.append(Second(number))
            second = self._seconds[-1]
            second.output += len(step.token_ids)
            if step.stats is not None:
                second.prefill += step.stats.num_prefill_tokens
            for request in done.started:
                second.ttft += request.metrics.ttft or 0.0
                second.started += 1
            for previous, count in done.gaps.items():
                second.gaps += (step.now - previous) * count
                second.gap_count += count

    def series(self, now: float) -> dict[str, list[Any]]:
        """Columns of `HISTORY` entries, oldest first, up to the last whole second: tokens put out and prefilled, and
        mean seconds to first token and between tokens (None where there were none)."""
        with self._lock:
            known = {second.number: second for second in self._seconds}
        last = int(now)
        seconds = [known.get(number) or Second(number) for number in range(last - HISTORY, last)]
        return {
            "output": [second.output for second in seconds],
            "prefill": [second.prefill for second in seconds],
            "ttft": [second.ttft / second.started if second.started else None for second in seconds],
            "itl": [second.gaps / second.gap_count if second.gap_count else None for second in seconds],
        }


class LiveView:
    """Answers `/live`. Used from the event loop."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._clock = state.llm.front.clock
        self._began = self._clock.now()
        self._history = History()
        state.llm.front.observe(self._history)
        self._look: asyncio.Task[dict[str, Any]] | None = None
        self._seen: dict[str, Any] = {"status": "starting", "reason": None, "engine": None}
        self._answer = b""
        self._made = -INTERVAL

    async def answer(self) -> bytes:
        """The JSON document; the same for everyone who asks within `INTERVAL`."""
        if self._look is None and (not self._answer or self._clock.now() - self._made >= INTERVAL):
            self._look = asyncio.ensure_future(self._ask())
        look = self._look
        if look is not None:
            await asyncio.wait({look}, timeout=PATIENCE)
            if self._look is look:  # otherwise another request has done the following
                self._take(look)
        return self._answer

    def _take(self, look: asyncio.Task[dict[str, Any]]) -> None:
        now = self._clock.now()
        if look.done():
            self._look = None
            self._seen = look.result()
            self._made = now
        front = self._state.llm.front
        self._answer = msgspec.json.encode(
            {
                "model": self._state.model_names[0],
                "version": interlace.__version__,
                "uptime": now - self._began,
                "restarts": front.restarts,
                "interval": INTERVAL,
                "age": now - self._made,
                **self._seen,
                "history": self._history.series(now),
            }
        )

    async def _ask(self) -> dict[str, Any]:
        front = self._state.llm.front
        try:
            snapshot = await asyncio.to_thread(front.snapshot, MAX_SHOWN)
        except EngineDeadError:
            health = await asyncio.to_thread(front.health, PATIENCE)
            return {"status": health.status, "reason": health.reason, "engine": None}
        status = "ok" if snapshot.degraded is None else "degraded"
        return {"status": status, "reason": snapshot.degraded, "engine": describe(snapshot)}


def describe(snapshot: EngineSnapshot) -> dict[str, Any]:
    """A snapshot as JSON takes it: the block map as runs of (state, length)."""
    engine: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(snapshot, blocks=b""))
    engine["blocks"] = [[state, sum(1 for _ in run)] for state, run in itertools.groupby(snapshot.blocks)]
    return engine


def install(app: FastAPI, state: ServerState) -> None:
    """Add the page at `/`, its files below `/page/`, and `/live`."""
    view = LiveView(state)

    @app.get("/live", tags=["operation"], summary="The engine at this moment", response_class=Response)
    async def live() -> Response:
        """Requests, KV blocks, plugins in force, and the last two minutes, as the page shows them."""
        return Response(await view.answer(), media_type="application/json", headers={"Cache-Control": "no-store"})

    index = (PAGE / "index.html").read_bytes()

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return Response(index, media_type="text/html", headers=PAGE_HEADERS)

    # In an editable install the files are links.
    app.mount("/page", PageFiles(directory=PAGE, follow_symlink=True))


class PageFiles(StaticFiles):
    """The page's files, with the headers of the page."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(PAGE_HEADERS)
        return response

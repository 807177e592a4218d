"""HTTP counters, as the outermost ASGI layer: what is refused before it reaches a route is counted, too."""

from __future__ import annotations

import threading

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Series = tuple[str, str, str]
"""(method, route, status)."""
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class HttpTotals:
    """Requests by method, route and status, and those under way. Routes are path templates, so labels are few."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests: dict[Series, int] = {}
        self.in_flight = 0
        self.rejections: dict[str, int] = {}
        """Reason → requests refused because the queue was full."""

    def begin(self) -> None:
        with self.lock:
            self.in_flight += 1

    def end(self, series: Series) -> None:
        with self.lock:
            self.in_flight -= 1
            self.requests[series] = self.requests.get(series, 0) + 1

    def reject(self, reason: str) -> None:
        """A request was refused because the queue is full."""
        with self.lock:
            self.rejections[reason] = self.rejections.get(reason, 0) + 1


_OVERLOADED = b'"code":"overloaded"'
"""In the error object of a request that found the queue full."""


class CountRequests:
    """ASGI middleware that feeds `HttpTotals`. A response that never began counts as status `499`: the client left.

    Goes around the guard, whose refusals are the interesting ones."""

    def __init__(self, app: ASGIApp, totals: HttpTotals) -> None:
        self._app = app
        self._totals = totals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "499"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            elif status == "503" and _OVERLOADED in message.get("body", b""):
                self._totals.reject("max_num_queued_reqs")
            await send(message)

        self._totals.begin()
        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = "500" if status == "499" else status  # the server's own error page lies outside
            raise
        finally:
            self._totals.end((_method(scope), _route(scope), status))


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"


def _route(scope: Scope) -> str:
    """The template of the route that answered, or `other`: a client must not be able to make up labels."""
    return str(getattr(scope.get("route"), "path", "other"))

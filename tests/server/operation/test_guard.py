"""What a request must pass before a route sees it."""

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from interlace.clock import MonotonicClock
from interlace.config.settings import ServerSettings
from interlace.server.auth import ApiKeys
from interlace.server.http import wrap

KEY, OTHER = "sk-first-of-two", "sk-second-of-two"


class Client:
    """Speaks ASGI to an application."""

    def __init__(self, settings=None, keys=(), max_running=4, app=None):
        self.guard, self.app = wrap(
            app or Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST", "OPTIONS"])]),
            ServerSettings(**(settings or {})),
            ApiKeys(list(keys)),
            max_running,
            MonotonicClock(),
        )

    async def ask(self, method, path, headers=(), body=(), root_path=""):
        """(status, headers, JSON) of the answer; `body` are its pieces."""
        pieces = body if isinstance(body, list) else [b""]
        left = asyncio.Event()

        async def receive():
            if pieces:
                piece = pieces.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
            await left.wait()
            return {"type": "http.disconnect"}

        sent = []

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": root_path + path,
            "root_path": root_path,
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
            "client": ("127.0.0.1", 1),
        }
        await self.app(scope, receive, send)
        answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        text = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], answered, json.loads(text) if text.startswith(b"{") else text

    async def post(self, size, path="/v1/completions", chunked=False, declared=None):
        length = ("Content-Length", str(size if declared is None else declared))
        headers = [("Transfer-Encoding", "chunked") if chunked else length]
        whole, rest = divmod(size, 1000)
        return await self.ask("POST", path, headers, [b"x" * 1000] * whole + [b"x" * rest])


async def echo(request: Request) -> JSONResponse:
    body = await request.body()
    return JSONResponse({"path": request.url.path, "size": len(body), "state": request.scope["state"]})


def bearer(key, scheme="Bearer"):
    return [("Authorization", f"{scheme} {key}")]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/docs", "/openapi.json", "/health/generate", "/load", "/x"]
)
async def test_every_path_needs_a_key_unless_it_is_named(path):
    client = Client(keys=[KEY, OTHER])
    status, headers, answer = await client.ask("GET", path)
    assert (status, headers["www-authenticate"], answer["error"]["code"]) == (401, "Bearer", "missing_api_key")
    status, headers, answer = await client.ask("GET", path, bearer("sk-wrong-but-long"))
    assert (status, headers["www-authenticate"], answer["error"]["code"]) == (401, "Bearer", "invalid_api_key")
    for key in (KEY, OTHER):
        assert (await client.ask("GET", path, bearer(key)))[0] == 200
    assert (await client.ask("GET", path, bearer(KEY, "bearer")))[0] == 200


@pytest.mark.parametrize("header", [KEY, f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY} {KEY}", f"Bearer {KEY}x"])
async def test_other_forms_of_a_key_are_refused(header):
    assert (await Client(keys=[KEY]).ask("GET", "/v1/models", [("Authorization", header)]))[0] == 401


@pytest.mark.parametrize("path", ["/health", "/ready", "/", "/page/app.js"])
async def test_open_paths_are_open_for_reading_only(path):
    client = Client(keys=[KEY])
    assert (await client.ask("GET", path))[0] == 200
    assert (await client.ask("POST", path))[0] == 401


@pytest.mark.parametrize("path", ["/health/", "/healthz", "/ready/x", "/pages", "/page", "/HEALTH", "//health"])
async def test_neighbours_of_open_paths_are_not_open(path):
    assert (await Client(keys=[KEY]).ask("GET", path))[0] == 401


async def test_without_the_page_its_paths_are_not_open():
    client = Client({"page": False}, keys=[KEY])
    assert [(await client.ask("GET", path))[0] for path in ("/", "/page/app.js", "/health")] == [401, 401, 200]


async def test_paths_are_judged_without_the_proxys_prefix():
    client = Client(keys=[KEY])
    assert (await client.ask("GET", "/health", root_path="/llm"))[0] == 200
    assert (await client.ask("GET", "/v1/models", root_path="/health"))[0] == 401


async def test_keys_isolate_caches_only_when_asked_to():
    salts = {}
    for isolate in (False, True):
        client = Client({"isolate_keys": isolate}, keys=[KEY, OTHER])
        answers = [await client.ask("GET", "/v1/x", bearer(key)) for key in (KEY, OTHER, KEY)]
        salts[isolate] = [answer["state"]["key_salt"] for _, _, answer in answers]
    assert salts[False] == [None, None, None]
    first, second, again = salts[True]
    assert first == again != second
    assert KEY not in first


async def test_a_body_arrives_whole_or_is_refused():
    client = Client({"max_body_size": "10KB"})
    for chunked in (False, True):
        status, _, answer = await client.post(10_000, chunked=chunked)
        assert (status, answer["size"]) == (200, 10_000)
        status, _, answer = await client.post(10_001, chunked=chunked)
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        assert "server.max_body_size" in answer["error"]["message"]
    status, _, _ = await client.post(20_000, declared=5)  # a length that lies
    assert status == 413


async def test_a_declared_length_is_refused_before_the_body_is_read():
    pieces = [b"x"] * 3
    status, _, _ = await Client({"max_body_size": "1KB"}).ask("POST", "/v1/x", [("Content-Length", "1001")], pieces)
    assert (status, len(pieces)) == (413, 3)


class Held:
    """An application whose requests end when told to."""

    def __init__(self):
        self.entered = 0
        self.release = asyncio.Event()

    async def __call__(self, scope, receive, send):
        self.entered += 1
        await self.release.wait()
        await JSONResponse({})(scope, receive, send)


async def hold(client, count, method="POST"):
    tasks = [asyncio.ensure_future(client.ask(method, "/v1/completions")) for _ in range(count)]
    while client.guard.working < count:
        await asyncio.sleep(0)
    return tasks


async def test_a_burst_is_bounded_before_anything_is_read():
    held = Held()
    client = Client({"max_waiting": 6}, max_running=4, app=held)
    tasks = [asyncio.ensure_future(client.ask("POST", "/v1/completions")) for _ in range(5000)]
    done, _ = await asyncio.wait(tasks, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    while held.entered + len(done) < 5000:
        await asyncio.sleep(0)
        done = [task for task in tasks if task.done()]
    assert held.entered == 10
    refused = [await task for task in done]
    assert {(status, headers["retry-after"]) for status, headers, _ in refused} == {(503, "1")}
    assert refused[0][2]["error"]["code"] == "overloaded"
    held.release.set()
    assert (await client.ask("GET", "/metrics"))[0] == 200
    assert {status for status, _, _ in await asyncio.gather(*tasks[:10])} == {200}
    assert client.guard.working == 0


async def test_without_a_limit_nobody_is_refused():
    held = Held()
    tasks = await hold(Client({"max_waiting": 0}, max_running=1, app=held), 100)
    held.release.set()
    assert {status for status, _, _ in await asyncio.gather(*tasks)} == {200}


async def test_a_drain_refuses_the_new_and_waits_for_the_old():
    held = Held()
    client = Client({"drain_timeout_s": 7.0}, app=held)
    tasks = await hold(client, 3)
    drained = asyncio.ensure_future(client.guard.drain())
    await asyncio.sleep(0)
    for path in ("/v1/completions", "/ready", "/docs"):
        status, headers, answer = await client.ask("GET", path)
        assert (status, headers["retry-after"], answer["error"]["code"]) == (503, "7", "shutting_down")
    assert not drained.done()
    held.release.set()
    assert {status for status, _, _ in await asyncio.gather(*tasks)} == {200}
    await asyncio.wait_for(drained, 60)
    assert (await client.ask("GET", "/health"))[0] == 200  # the truth, to the end
    await asyncio.wait_for(client.guard.drain(), 60)


async def test_a_request_without_end_is_ended(monkeypatch):
    monkeypatch.setattr("interlace.server.guard.LATE", 0.0)
    status, _, answer = await Client({"request_timeout_s": 0.05}, app=Held()).ask("POST", "/v1/x")
    assert (status, answer["error"]["code"]) == (504, "timeout")
    assert "server.request_timeout_s" in answer["error"]["message"]


async def test_a_timeout_of_the_application_itself_is_its_own():
    async def failing(scope, receive, send):
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await Client({"request_timeout_s": 5.0}, app=failing).ask("POST", "/v1/x")


async def test_a_client_that_leaves_during_its_body_costs_nothing():
    held = Held()
    client = Client(app=held)

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        raise AssertionError("nobody is there")

    scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": [(b"content-length", b"5")]}
    await client.app(scope, receive, send)
    assert (held.entered, client.guard.working) == (0, 0)


async def test_websockets_are_closed():
    sent = []

    async def send(message):
        sent.append(message)

    await Client(keys=[KEY]).app({"type": "websocket", "path": "/health", "headers": []}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


PREFLIGHT = [("Origin", "https://page.example"), ("Access-Control-Request-Method", "POST")]
PREFLIGHT += [("Access-Control-Request-Headers", "authorization,content-type")]


async def test_cors_is_off_unless_origins_are_named():
    status, headers, _ = await Client().ask("GET", "/v1/models", PREFLIGHT[:1])
    assert status == 200
    assert not any(name.startswith("access-control") for name in headers)
    assert (await Client(keys=[KEY]).ask("OPTIONS", "/v1/models", PREFLIGHT))[0] == 401


async def test_preflights_need_no_key_and_answers_carry_the_origin():
    client = Client({"cors_origins": ["https://page.example"]}, keys=[KEY])
    status, headers, _ = await client.ask("OPTIONS", "/v1/models", PREFLIGHT)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://page.example")
    assert "authorization" in headers["access-control-allow-headers"].lower()
    status, headers, _ = await client.ask("GET", "/v1/models", PREFLIGHT[:1])
    assert (status, headers["access-control-allow-origin"]) == (401, "https://page.example")  # else pages cannot see it
    status, headers, _ = await client.ask("OPTIONS", "/v1/models", [("Origin", "https://other"), *PREFLIGHT[1:]])
    assert status == 400
    assert "access-control-allow-origin" not in headers

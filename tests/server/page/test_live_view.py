"""`/live` without a browser: one look at the engine for all who ask, and the page's own answers."""

from __future__ import annotations

import asyncio

import httpx

from interlace.server.app import create_app
from interlace.server.state import ServerState


def client(running, **changes):
    settings = running.llm.loaded.settings.server.model_copy(update=changes)
    app = create_app(ServerState(running.llm, settings, ("a-model",), 0))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


async def test_many_viewers_cost_one_look(running, monkeypatch):
    front, looks = running.llm.front, []
    ask = front.snapshot
    monkeypatch.setattr(front, "snapshot", lambda *limits: looks.append(1) or ask(*limits))
    async with client(running) as http:
        answers = await asyncio.gather(*(http.get("/live") for _ in range(20)))
    assert len(looks) == 1
    assert len({answer.content for answer in answers}) == 1
    live = answers[0].json()
    assert (live["model"], live["status"], live["restarts"]) == ("a-model", "ok", 0)
    assert sum(length for _, length in live["engine"]["blocks"]) == live["engine"]["num_blocks"]
    assert {len(column) for column in live["history"].values()} == {120}


async def test_the_page_asks_browsers_for_nothing_from_elsewhere(running):
    async with client(running) as http:
        for path in ("/", "/page/main.js", "/page/style.css"):
            answer = await http.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-security-policy"].startswith("default-src 'self';")
            assert "https://" not in answer.text
        assert (await http.get("/page/../live.py")).status_code == 404


async def test_the_page_can_be_off(running):
    async with client(running, page=False) as http:
        for path in ("/", "/page/main.js", "/live"):
            assert (await http.get(path)).status_code == 404

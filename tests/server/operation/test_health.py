"""What the health routes say of an engine that works, stalls and dies."""

import asyncio
import threading

import httpx
import pytest
from fastapi import FastAPI

from interlace.config.settings import ServerSettings
from interlace.engine.async_llm import AsyncLLM
from interlace.engine.client import EngineHealth
from interlace.engine.front import Front
from interlace.server import health
from interlace.server.state import ServerState
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import fake_assembly


class Engine(ScriptedClient):
    """Scripted, with a health of the test's choice."""

    def __init__(self, answer=lambda request: [1, 2, 3], **options):
        super().__init__(answer, **options)
        self.state = EngineHealth(status="ok")
        self.asked = 0
        self.answers = threading.Event()
        self.answers.set()

    def health(self, timeout=5.0):
        self._check_alive()
        self.asked += 1
        assert self.answers.wait(30)
        return self.state


@pytest.fixture
async def served():
    """(engine, client of its health routes)"""
    engine = Engine()
    async with AsyncLLM.from_front(Front(fake_assembly(engine))) as llm:
        app = FastAPI()
        app.include_router(health.router(ServerState(llm, ServerSettings(), ("fake",), 0)))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield engine, client


@pytest.mark.parametrize(
    ("status", "code"), [("ok", 200), ("degraded", 200), ("restarting", 503), ("dead", 503)], ids=str
)
async def test_states(served, status, code):
    engine, client = served
    engine.state = EngineHealth(status=status, reason="because", num_running=3)
    response = await client.get("/health")
    assert (response.status_code, response.json()["status"], response.json()["reason"]) == (code, status, "because")
    response = await client.get("/ready")
    assert (response.status_code, response.json()) == (code, {"ready": code == 200, "status": status})


async def test_a_dead_engine_is_said_to_be_dead(served):
    engine, client = served
    engine.die(RuntimeError("the cause"))
    response = await client.get("/health")
    assert (response.status_code, response.json()["status"]) == (503, "dead")
    assert "the cause" in response.json()["reason"]
    response = await client.get("/health/generate")
    assert (response.status_code, response.json()["status"]) == (503, "failed")


async def test_many_that_ask_are_one_question(served):
    engine, client = served
    engine.answers.clear()
    asking = [asyncio.ensure_future(client.get("/health")) for _ in range(50)]
    while not engine.asked:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    engine.answers.set()
    assert {response.status_code for response in await asyncio.gather(*asking)} == {200}
    assert engine.asked <= 2
    await client.get("/health")
    assert engine.asked <= 3


async def test_one_that_stops_asking_does_not_stop_the_others(served):
    engine, client = served
    engine.answers.clear()
    first, second = (asyncio.ensure_future(client.get("/health")) for _ in range(2))
    while not engine.asked:
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    engine.answers.set()
    assert (await second).status_code == 200


async def test_generate_and_load(served):
    engine, client = served
    response = await client.get("/health/generate")
    assert (response.status_code, response.json()["status"], response.json()["tokens"]) == (200, "ok", 1)
    assert engine.added[-1].priority == health.FIRST
    response = await client.get("/load")
    assert response.json() == {"server_load": 0, "running": 0, "waiting": 0, "max_waiting": 1024}


async def test_generate_has_a_limit(served, monkeypatch):
    engine, client = served
    monkeypatch.setattr(health, "GENERATE_TIMEOUT", 0.05)
    monkeypatch.setattr(engine, "add", lambda requests: None)  # it takes them and does nothing
    response = await client.get("/health/generate")
    assert (response.status_code, response.json()["reason"]) == (503, "no token within 0.05 s")

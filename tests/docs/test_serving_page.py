"""docs/serving.md says what the server does: settings, routes, metrics and error codes exist, and none is left out."""

from __future__ import annotations

import re

import pytest

from interlace.config import all_settings
from interlace.config.settings import ServerSettings
from interlace.engine.async_llm import AsyncLLM
from interlace.engine.front import Front
from interlace.server.app import create_app
from interlace.server.metrics.names import METRICS
from interlace.server.state import ServerState
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import fake_assembly


@pytest.fixture(scope="module")
def page(repo_root) -> str:
    return (repo_root / "docs" / "serving.md").read_text("utf-8")


def test_all_settings_of_the_server_are_told_and_all_that_are_told_exist(page):
    known = {setting.key for setting in all_settings()}
    told = set(re.findall(r"`((?:server|engine|cache|scheduler)\.[a-z_]+)", page))
    assert told <= known
    told |= {key for key in known if f"`INTERLACE_{key.replace('.', '__').upper()}`" in page}
    assert {key for key in known if key.startswith("server.")} <= told


async def test_the_routes_are_those_of_the_server(page):
    client = ScriptedClient(lambda request: [1])
    async with AsyncLLM.from_front(Front(fake_assembly(client))) as llm:
        app = create_app(ServerState(llm, ServerSettings(), ("fake",), 0))
        served = set(app.openapi()["paths"])
    table = page.partition("| route | what it does |")[2].partition("\n\n")[0]
    told = {
        route for row in table.splitlines() for route in re.findall(r"`(/[^`]*)`", row.split("|")[1] if row else "")
    }
    assert told - {"/", "/live", "/docs", "/openapi.json"} == served - {"/live"}


def test_metrics_and_codes_exist(page, repo_root):
    names = {f"interlace:{metric.name}" for metric in METRICS}
    told = set(re.findall(r"`(interlace:\w+)`", page))
    assert len(told) > 10 and told <= names
    sources = "".join(path.read_text("utf-8") for path in (repo_root / "core").rglob("*.py"))
    codes = re.findall(r"(?:4\d\d|503|504) `([a-z_]+)`|\(`([a-z_]+)`\)", page)
    assert len(codes) >= 5
    for code in (first or second for first, second in codes):
        assert f'"{code}"' in sources, code

"""Replicas as real processes, with a scripted executor so that they start in a moment; the last tests use a model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
from pathlib import Path

import pytest

from interlace import LLM, Provider, SamplingParams, hookimpl
from interlace.config import load_settings
from interlace.engine.async_llm import AsyncLLM
from interlace.errors import ConfigError, EngineRestartingError, PluginNotFoundError, PluginOptionsError
from interlace.interfaces.router import Router
from interlace.testing.executor_suite import MODEL

LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
PROMPT = [1, 2, 3]


class Crooked(Router):
    """Raises now, and talks nonsense then."""

    def __init__(self, options):
        super().__init__(options)
        self.calls = 0

    def route(self, request, replicas):
        self.calls += 1
        if self.calls % 2:
            raise ZeroDivisionError("by design")
        return 1000

    def on_finished(self, request, replica):
        raise KeyError(request.id)


class Plugin:
    @hookimpl
    def interlace_routers(self):
        yield Provider(name="crooked", target=f"{__name__}:Crooked", api="1")

    @hookimpl
    def interlace_executors(self):
        yield Provider(name="scripted", target="interlace.testing.executor:ScriptedExecutor", api="1")


@pytest.fixture
def tiny(tmp_path):
    """`tiny(count, settings of the engine, options of the executor)`: settings of engines that need no model."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))

    def settings(replicas=2, engine=None, router=None, **options):
        return {
            "model": str(model),
            "checkpoint": {"use": "dummy"},
            "max_model_len": 256,
            "executor": {"use": "scripted", "options": {"scripted": {"delay_s": 0.005, "num_blocks": 256, **options}}},
            "engine": {"replicas": replicas, **(engine or {})},
            "router": {"use": router or "round_robin"},
        }

    return settings


def start(settings) -> LLM:
    return LLM(plugins=[Plugin()], **settings)


def serve(settings) -> AsyncLLM:
    loaded = load_settings(constructor=settings, env={})
    return AsyncLLM.from_loaded(loaded, plugins=[Plugin()], default_process="subprocess", supervised=True)


async def collect(llm, params=SHORT, started=None, prompt=PROMPT):
    tokens = []
    async for output in llm.generate(prompt, params):
        tokens += output.outputs[0].token_ids
        if started is not None:
            started.set()
    return tokens


async def until_ok(llm, timeout=60.0):
    async with asyncio.timeout(timeout):
        while (await llm.health()).status != "ok":
            await asyncio.sleep(0.01)


def pids(llm) -> list[int]:
    return llm.front.control("process_id")


# ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_answers_are_those_of_one_engine_and_come_from_all(tiny):
    prompts = [[number + 1] * 5 for number in range(8)]
    params = [SamplingParams(max_tokens=9, seed=number, n=1 + number % 2) for number in range(8)]
    answers = []
    for replicas in (1, 2):
        with start(tiny(replicas)) as llm:
            outputs = llm.generate(prompts, params, progress=False)
            answers.append([[one.token_ids for one in output.outputs] for output in outputs])
            steps = [part.steps for part in llm.front.health().replicas]
            assert len(steps) == (0 if replicas == 1 else 2) and all(steps)
    assert answers[0] == answers[1]


async def test_a_death_takes_its_own_and_it_comes_back(tiny):
    async with serve(tiny()) as llm:
        started = [asyncio.Event() for _ in range(4)]
        tasks = [asyncio.ensure_future(collect(llm, LONG, event)) for event in started]
        for event in started:
            await asyncio.wait_for(event.wait(), 30)
        before = pids(llm)
        os.kill(before[1], signal.SIGKILL)
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert [type(results[i]) for i in (1, 3)] == [EngineRestartingError] * 2
        assert "replica 1 of 2" in str(results[1]) and "signal 9" in str(results[1])
        assert [len(results[i]) for i in (0, 2)] == [200, 200]
        assert len(await collect(llm)) == 5
        await until_ok(llm)
        after = pids(llm)
        assert after[0] == before[0] and after[1] != before[1]
        assert not Path(f"/proc/{before[1]}").exists()
        for _ in range(2):
            await collect(llm)
        assert (await llm.health()).replicas[1].steps > 0
        assert llm.front.restarts == 1


async def test_a_crooked_router_loses_no_request(tiny, caplog):
    async with serve(tiny(router="crooked")) as llm:
        results = await asyncio.gather(*(collect(llm) for _ in range(30)))
        assert [len(tokens) for tokens in results] == [5] * 30
        health = await llm.health()
        assert health.status == "degraded" and "router 'crooked' was replaced by least_loaded" in health.reason
        assert all(part.steps for part in health.replicas), "the fallback uses both"
    assert caplog.text.count("ZeroDivisionError: by design") == 2, "one warning, with its traceback"


async def test_one_that_dies_too_often_stays_dead_and_the_other_serves(tiny):
    async with serve(tiny(engine={"max_restarts": 0})) as llm:
        os.kill(pids(llm)[0], signal.SIGKILL)
        async with asyncio.timeout(30):
            while (await llm.health()).replicas[0].status != "dead":
                await asyncio.sleep(0.01)
        assert not llm.front.death.done()
        assert len(await collect(llm)) == 5
        assert (await llm.health()).status == "degraded"
        assert pids(llm)[0] is None
        os.kill(pids(llm)[1], signal.SIGKILL)
        assert "signal 9" in str(await asyncio.wait_for(llm.wait_dead(), 30))
        assert (await llm.health()).status == "dead"


@pytest.mark.slow
async def test_nothing_is_lost_over_random_kills(tiny):
    """Clients that never stop, kills that do not either: every request ends, with an answer or a clear error."""
    rng = random.Random(7)
    answers, refusals, other = 0, 0, []
    over = asyncio.Event()

    async def client(number):
        nonlocal answers, refusals
        while not over.is_set():
            try:
                tokens = await collect(llm, SamplingParams(max_tokens=20, ignore_eos=True), prompt=[number + 1] * 40)
                answers += len(tokens) == 20
                other.extend([] if len(tokens) == 20 else [tokens])
            except EngineRestartingError:
                refusals += 1
                await asyncio.sleep(0.05)
            except Exception as error:
                other.append(error)
                return

    async with serve(tiny(3, {"max_restarts": 100}, router="prefix_affinity")) as llm:
        clients = [asyncio.ensure_future(client(number)) for number in range(12)]
        kills = 0
        while kills < 8:
            await asyncio.sleep(rng.random())
            with contextlib.suppress(EngineRestartingError):  # all of them are dead
                alive = [pid for pid in await llm.control("process_id") if pid is not None]
                os.kill(rng.choice(alive), signal.SIGKILL)
                kills += 1
        await until_ok(llm)
        over.set()
        await asyncio.wait_for(asyncio.gather(*clients), 60)
        assert other == [] and answers > 50 and refusals > 0
        await until_ok(llm)
        assert llm.front.num_active == 0
        assert all(part.num_running == part.num_waiting == 0 for part in (await llm.health()).replicas)
        assert llm.front.control("free_blocks") == [255] * 3


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_wrong_with_the_settings_is_said_before_anything_starts(tiny):
    with pytest.raises(ConfigError, match="needs a process for each"):
        start(tiny(engine={"process": "inline"}))
    with pytest.raises(PluginNotFoundError, match="Did you mean 'round_robin'"):
        start(tiny(router="round-robin"))
    wrong = tiny(router="least_loaded") | {"router": {"options": {"least_loaded": {"waiting_wait": 2}}}}
    with pytest.raises(PluginOptionsError, match=r"Did you mean 'router\.options\.least_loaded\.waiting_weight'"):
        start(wrong)
    with pytest.raises(ConfigError, match=r"engine\.replicas"):
        start(tiny(0))


# ── the real model ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_real_model_gives_the_same_text_from_every_replica():
    prompts = ["The capital of France is", "Two plus two is", "Water boils at", "The opposite of hot is"]
    settings = {"max_model_len": 256, "cache": {"memory": "64MiB"}, "threads": 2, "dtype": "float32"}
    texts = []
    for replicas in (1, 2):
        with LLM(engine={"replicas": replicas}, router={"use": "round_robin"}, **settings) as llm:
            outputs = llm.generate(prompts * 2, SamplingParams(max_tokens=8, temperature=0), progress=False)
            texts.append([output.outputs[0].text for output in outputs])
            if replicas == 2:
                blocks = llm.front.snapshot().replicas
                assert [part.steps > 0 for part in blocks] == [True, True]
                assert dict(llm.front.report())["threads"] == "1 (threads)"
    assert texts[0] == texts[1]

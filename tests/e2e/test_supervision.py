"""A server's engine process dies in every way there is; its clients are told, and the next request works.

The engine is a real process with a scripted executor, so that it starts in a moment; the last tests use real runners.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from interlace import LLM, SamplingParams
from interlace.config import load_settings
from interlace.engine.async_llm import AsyncLLM
from interlace.errors import EngineDeadError, EngineRestartingError
from interlace.testing.executor_suite import MODEL

LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
MEDIUM = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True, seed=1)
SHORT = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
PROMPT = [1, 2, 3]


@pytest.fixture
def tiny(tmp_path, install, monkeypatch):
    """Settings of an engine that needs no model, and may be told to fail."""
    (folder,) = install("faulty")
    monkeypatch.setenv("PYTHONPATH", folder)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))

    def settings(engine=None, **options):
        return {
            "model": str(model),
            "checkpoint": {"use": "dummy"},
            "max_model_len": 256,
            "scheduler": {"use": "faulty"},
            "executor": {"use": "scripted", "options": {"scripted": {"delay_s": 0.01, "num_blocks": 256, **options}}},
            "engine": engine or {},
        }

    yield settings
    for name in [name for name in sys.modules if name.startswith("interlace_faulty")]:
        del sys.modules[name]


def serve(settings) -> AsyncLLM:
    """As `interlace serve` makes it."""
    loaded = load_settings(constructor=settings, env={})
    return AsyncLLM.from_loaded(loaded, default_process="subprocess", supervised=True)


async def collect(llm, request_id=None, params=SHORT, started=None, **options):
    tokens = []
    async for output in llm.generate(PROMPT, params, request_id, **options):
        tokens += output.outputs[0].token_ids
        if started is not None:
            started.set()
    return tokens


async def streaming(llm, count, **options):
    """Tasks of so many clients, each of which has received something."""
    started = [asyncio.Event() for _ in range(count)]
    tasks = [
        asyncio.ensure_future(collect(llm, f"client-{i}", LONG, event, **options)) for i, event in enumerate(started)
    ]
    for event in started:
        await asyncio.wait_for(event.wait(), 60)
    return tasks


async def outcomes(tasks, timeout=60.0):
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout)


async def until_ok(llm, timeout=60.0) -> list[str]:
    """The statuses seen on the way."""
    seen: list[str] = []
    async with asyncio.timeout(timeout):
        while not seen or seen[-1] != "ok":
            status = (await llm.health()).status
            if not seen or seen[-1] != status:
                seen.append(status)
            await asyncio.sleep(0.005)
    return seen


async def restarted(llm, times, timeout=60.0) -> None:
    """Until an engine has been started again that often, and takes requests."""
    async with asyncio.timeout(timeout):
        while (await llm.health()).restarts < times:
            await asyncio.sleep(0.005)
    await until_ok(llm)


def engine_pid(llm) -> int:
    return llm.front.control("process_id")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_killed_mid_stream(tiny, caplog):
    """Every client is told at once, the next engine answers, and gives nobody what was meant for another."""
    async with serve(tiny()) as llm:
        expected = await collect(llm, params=MEDIUM)
        tasks = await streaming(llm, 5)
        assert llm.front.num_active == 5
        os.kill(engine_pid(llm), signal.SIGKILL)
        results = await outcomes(tasks)
        assert {type(error) for error in results} == {EngineRestartingError}
        assert all("was killed by signal 9" in str(error) and error.retry_after >= 1.0 for error in results)
        with pytest.raises(EngineRestartingError, match="a new engine is being started"):
            await collect(llm)
        assert (llm.front.num_active, llm.front.num_waiting) == (0, 0)
        assert await until_ok(llm) == ["restarting", "ok"]
        health = await llm.health()
        assert health.restarts == llm.front.restarts == 1 and "signal 9" in health.last_cause
        again = await asyncio.gather(*(collect(llm, f"client-{i}", MEDIUM) for i in range(5)))
        assert again == [expected] * 5
        assert not llm.front.death.done()
    assert "was killed by signal 9 without a word; a new engine is being started" in caplog.text


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("exit", "ended with status 137 without a word"),
        ("interrupt", "the engine process stopped: KeyboardInterrupt: nobody catches this"),
        ("hang", "the engine loop is stuck"),
    ],
)
async def test_it_dies_of_a_request(tiny, caplog, fault, cause):
    async with serve(tiny({"step_timeout_s": 1.5})) as llm:
        tasks = await streaming(llm, 2)
        tasks.append(asyncio.ensure_future(collect(llm, params=LONG, labels={"fault": fault, "after": "3"})))
        results = await outcomes(tasks)
        assert all(type(error) is EngineRestartingError and cause in str(error) for error in results)
        assert await until_ok(llm) == ["restarting", "ok"]
        assert len(await collect(llm)) == 5
        assert cause in (await llm.health()).last_cause
    assert cause in caplog.text
    if fault != "exit":  # the child could say what happened: the parent's log leads to the culprit
        assert "Traceback" in caplog.text and 'interlace_faulty_scheduler.py", line' in caplog.text
    if fault == "hang":
        assert "running: 3\n  client-0: prompt 3, computed" in caplog.text and "thread MainThread:" in caplog.text


@pytest.mark.slow
async def test_a_crash_loop_ends(tiny, caplog):
    """Each new engine dies in its third step: at last nothing more is tried, and that is said, too."""
    settings = tiny({"max_restarts": 2}, fail_steps=[2], healthy_after_failure=False)
    async with serve(settings) as llm:
        dead = asyncio.ensure_future(llm.wait_dead())
        for attempt in range(3):
            with pytest.raises(EngineDeadError, match="the scripted executor is broken") as caught:
                await collect(llm, params=LONG)
            assert "scripted failure of step 2" in str(caught.value.__cause__.__cause__), "the traceback of the child"
            if attempt < 2:
                await restarted(llm, attempt + 1)
        error = await asyncio.wait_for(dead, 60)
        assert "failure 3 within 300 s (engine.max_restarts = 2)" in str(error)
        health = await llm.health()
        assert (health.status, health.restarts) == ("dead", 2)
        with pytest.raises(EngineDeadError, match="it is not started again") as caught:
            await collect(llm)
        assert type(caught.value) is EngineDeadError
    assert caplog.text.count("RuntimeError: scripted failure of step 2") >= 3 and "Traceback" in caplog.text


@pytest.mark.slow
async def test_finished_and_failed_requests_are_both_reported(tiny):
    class Listener:
        def __init__(self):
            self.ends = []

        def on_submit(self, requests):
            pass

        def on_step(self, step, done):
            self.ends += [(end.request_id, end.finish_reason, end.error_code) for end in done.summaries]

    async with serve(tiny()) as llm:
        listener = Listener()
        llm.front.observe(listener)
        await collect(llm, "good")
        tasks = await streaming(llm, 2)
        os.kill(engine_pid(llm), signal.SIGKILL)
        await outcomes(tasks)
        await until_ok(llm)
        assert listener.ends[0] == ("good", "length", None)
        assert sorted(listener.ends[1:]) == [(f"client-{i}", "error", "engine_dead") for i in range(2)]


@pytest.mark.slow
async def test_ten_restarts_leave_nothing_behind(tiny, tmp_path_factory, monkeypatch):
    temporary = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def held():
        names = sorted(thread.name for thread in threading.enumerate())
        # asyncio's own pool grows with what happens to overlap.
        return len(os.listdir("/proc/self/fd")), [name for name in names if not name.startswith("asyncio_")]

    async with serve(tiny({"max_restarts": 100, "restart_window_s": 0.001})) as llm:
        pids = []
        before = None
        for count in range(11):
            pids.append(engine_pid(llm))
            [task] = await streaming(llm, 1)
            os.kill(pids[-1], signal.SIGKILL)
            await outcomes([task])
            await restarted(llm, count + 1)
            before = before or held()
        assert held() == before
        assert len(list(temporary.iterdir())) == 1
        assert len(set(pids)) == 11 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
async def test_an_idle_server_costs_no_cpu(tiny):
    async with serve(tiny()) as llm:
        await collect(llm)
        pids = (os.getpid(), engine_pid(llm))
        await asyncio.sleep(0.2)
        before = sum(map(cpu_seconds, pids))
        await asyncio.sleep(5.0)
        assert sum(map(cpu_seconds, pids)) - before <= 0.1


# ── Inline ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_hung_inline_engine_is_dead_and_says_so(tiny, caplog):
    settings = tiny({"process": "inline", "step_timeout_s": 1.5})
    async with serve(settings) as llm:
        dead = asyncio.ensure_future(llm.wait_dead())
        tasks = await streaming(llm, 2)
        tasks.append(asyncio.ensure_future(collect(llm, params=LONG, labels={"fault": "hang"})))
        results = await outcomes(tasks)
        assert {type(error) for error in results} == {EngineDeadError}
        assert "the engine loop is stuck" in str(await asyncio.wait_for(dead, 60))
        assert (await llm.health()).status == "dead"
    assert "running: 2" in caplog.text and "thread interlace-engine:" in caplog.text


def test_llm_raises_when_a_step_hangs_and_can_still_be_closed(tiny):
    with LLM(**tiny({"step_timeout_s": 1.5})) as llm:
        with pytest.raises(EngineDeadError, match="the engine loop is stuck"):
            llm.generate([PROMPT], LONG, labels={"fault": "hang"}, progress=False)
        assert llm.front.health().status == "dead"


def test_llm_in_a_child_is_not_restarted(tiny):
    with LLM(**tiny({"process": "subprocess"})) as llm:
        os.kill(llm.front.control("process_id"), signal.SIGKILL)
        assert "signal 9" in str(llm.front.death.result(60))
        with pytest.raises(EngineDeadError, match="signal 9") as caught:
            llm.generate([PROMPT], SHORT, progress=False)
        assert type(caught.value) is EngineDeadError


# ── The real model ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
async def test_the_real_model_comes_back_with_the_same_answer():
    settings = {"max_model_len": 256, "cache": {"memory": "64MiB"}}
    async with serve(settings) as llm:
        answer = await collect(llm, params=SHORT)
        tasks = await streaming(llm, 4)
        os.kill(engine_pid(llm), signal.SIGKILL)
        assert all(type(error) is EngineRestartingError for error in await outcomes(tasks))
        assert await until_ok(llm) == ["restarting", "ok"]
        assert await collect(llm, params=SHORT) == answer


@pytest.mark.slow
async def test_a_logits_processor_that_never_returns(tiny, caplog):
    """In the worker, in the middle of a step of the real runner."""
    settings = tiny({"step_timeout_s": 5.0}) | {
        "executor": {"use": "uniprocess"},
        "scheduler": {"use": "fcfs"},
        "logits_processors": {"use": ["stuck"]},
        "cache": {"memory": "16MiB"},
    }
    async with serve(settings) as llm:
        stuck = SamplingParams(max_tokens=5, logits_processors={"stuck": {}})
        with pytest.raises(EngineRestartingError, match="the engine loop is stuck"):
            await collect(llm, params=stuck)
        await until_ok(llm)
        assert len(await collect(llm)) == 5
    assert "interlace_faulty_processor.py" in caplog.text and "in apply" in caplog.text

"""A server's tree of processes (front, engine core, ranks): whichever is killed, no other stays and service resumes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from interlace import SamplingParams
from interlace.config import load_settings
from interlace.engine.async_llm import AsyncLLM
from interlace.errors import EngineRestartingError
from interlace.testing.executor_suite import SETTINGS, ExecutorConformance
from interlace.testing.footprint import Footprint

LONG = SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


class Suite(ExecutorConformance):
    """For its means; its tests are elsewhere."""

    __test__ = False
    executor = "multiprocess"


@pytest.fixture
def settings(tmp_path):
    Suite().spec(tmp_path)  # writes the tiny model
    return {
        "model": str(tmp_path),
        **SETTINGS,
        "engine.max_restarts": 10,
        "executor.use": "multiprocess",
        "executor.options.multiprocess.tensor_parallel": 2,
    }


async def collect(llm, params=SHORT, started=None):
    tokens = []
    async for output in llm.generate([1, 2, 3], params):
        tokens += output.outputs[0].token_ids
        if started is not None:
            started.set()
    return tokens


async def until_restarted(llm, times):
    async with asyncio.timeout(90):
        while True:
            health = await llm.health()
            if health.restarts == times and health.status == "ok":
                return health
            await asyncio.sleep(0.02)


async def failures_of_streams(llm, kill):
    """What three clients in the middle of their answers are told after `kill`."""
    started = [asyncio.Event() for _ in range(3)]
    tasks = [asyncio.ensure_future(collect(llm, LONG, event)) for event in started]
    for event in started:
        await asyncio.wait_for(event.wait(), 60)
    kill()
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)


def rank_pids(llm):
    return [rank["pid"] for rank in llm.front.control("ranks")]


def gone(pids, timeout=60.0):
    """Whether all of them are, soon."""
    deadline = time.monotonic() + timeout
    while left := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return not left


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_server_survives_the_death_of_each_process(settings, caplog):
    before = Footprint.take()
    loaded = load_settings(settings, env={})
    async with AsyncLLM.from_loaded(loaded, default_process="subprocess", supervised=True) as llm:
        expected = await collect(llm)
        during = Footprint.take()

        old = rank_pids(llm)
        os.kill(old[1], signal.SIGKILL)  # while nothing runs: nobody asks, and yet a new engine comes
        health = await until_restarted(llm, 1)
        assert f"rank 1 (pid {old[1]}) was killed by signal 9 (SIGKILL)" in health.last_cause
        assert gone(old) and await collect(llm) == expected

        old = rank_pids(llm)
        errors = await failures_of_streams(llm, lambda: os.kill(old[0], signal.SIGKILL))
        assert {type(error) for error in errors} == {EngineRestartingError}
        assert all(f"rank 0 (pid {old[0]}) was killed by signal 9" in str(error) for error in errors)
        await until_restarted(llm, 2)
        assert gone(old) and await collect(llm) == expected

        old = [*rank_pids(llm), llm.front.control("process_id")]
        errors = await failures_of_streams(llm, lambda: os.kill(old[-1], signal.SIGKILL))
        assert {type(error) for error in errors} == {EngineRestartingError}
        assert gone(old[:-1]), "ranks outlive their engine core"
        await until_restarted(llm, 3)
        assert await collect(llm) == expected
    left = before.left_of(during, 10.0)
    assert not [what for what in left if not what.startswith("thread 'asyncio_")], "the event loop's own go with it"
    assert "was killed by signal 9" in caplog.text


def tree_of(pid):
    """Its descendants."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *tree_of(int(child))]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["front", "engine core"])
@pytest.mark.parametrize("phase", ["loading", "idle", "step"])
def test_nothing_outlives_a_front_or_an_engine_core_that_is_killed(tmp_path, phase, victim):
    script = Path(__file__).with_name("multiprocess_front.py")
    names = set(os.listdir("/dev/shm"))
    front = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), phase], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert front.stdout is not None and front.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while len(tree := tree_of(front.pid)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)  # well into the phase
        core, *ranks = tree
        os.kill(core if victim == "engine core" else front.pid, signal.SIGKILL)
        assert gone(ranks), f"of the ranks {ranks} some still run"
        if victim == "front":
            assert gone([core])
    finally:
        front.kill()
        front.communicate()
    assert not {name for name in set(os.listdir("/dev/shm")) - names if "interlace" in name}

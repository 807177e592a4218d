"""What the front makes of an engine's death: who is told, what is counted, and what comes after."""

import asyncio
import threading
from typing import ClassVar

import pytest

from interlace import SamplingParams, hookimpl
from interlace.engine.async_llm import AsyncLLM
from interlace.engine.front import Front, Observer
from interlace.errors import EngineDeadError, EngineRestartingError, EngineSilentError
from interlace.interfaces.executor import ExecutorInfo
from interlace.kv.specs import KVCacheConfig
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import byte_tokenizer, fake_assembly

TOKENIZER = byte_tokenizer()


class Inbox:
    def __init__(self):
        self.news = []

    def deliver(self, requests):
        self.news += [request.id for request in requests]


class Restartable(ScriptedClient):
    """Its engine is replaced at once."""

    def __init__(self):
        super().__init__(lambda request: TOKENIZER.encode("again ") * 20, auto=False)

    def replace(self, cause=None):
        error = EngineRestartingError("it died; a new engine is being started", 3.0)
        error.__cause__ = cause
        self._scripts.clear()
        self._on_death(error)
        kv = KVCacheConfig(block_size=16, num_blocks=77, groups=(), bytes_per_block=1)
        self.on_restart(ExecutorInfo(kv=kv))


@pytest.fixture
def client():
    return Restartable()


@pytest.fixture
def front(client):
    front = Front(fake_assembly(client))
    yield front
    front.shutdown()


def submit(front, request_id="r", sink=None, **params):
    prepared = front.prepare("hello", SamplingParams(max_tokens=50, **params), request_id=request_id)
    [request] = front.submit([prepared], sink or Inbox(), streaming=True)
    return request


def test_requests_of_the_old_engine_fail_and_the_new_one_takes_more(front, client):
    inbox = Inbox()
    old = submit(front, sink=inbox)
    client.step()
    client.replace(ValueError("broken"))
    assert inbox.news[-1] == "r"
    with pytest.raises(EngineRestartingError, match="a new engine is being started") as caught:
        front.take(old)
    assert caught.value.retry_after == 3.0 and isinstance(caught.value.__cause__, ValueError)
    new = submit(front)  # under the same id
    client.step()
    assert front.take(new).outputs[0].token_ids == TOKENIZER.encode("a")
    assert front.whole(new).usage.completion_tokens == 1
    with pytest.raises(EngineRestartingError):
        front.take(old)
    front.abort([old])  # leaves the new one of that name alone
    assert client.aborted == [] and front.find("r") is new


def test_after_a_restart_the_facts_are_those_of_the_new_engine(front, client):
    client.replace()
    assert (front.info.kv.num_blocks, front.restarts) == (77, 1)
    assert front.health().status == "ok" and not front.death.done()


def test_a_request_that_slips_between_two_engines_is_not_lost(front, client):
    """It is registered, its engine dies, and it reaches the next one, which is told to drop it."""
    add = client.add

    def die_and_add(requests):
        client.replace()
        add(requests)

    client.add = die_and_add
    with pytest.raises(EngineRestartingError):
        submit(front)
    assert client.aborted == ["r"] and front.num_active == 0


def test_a_death_for_good_is_a_status_and_a_future(front, client):
    client.die(ValueError("broken"))
    assert str(front.death.result(0)) == "the engine stopped: ValueError: broken"
    health = front.health()
    assert (health.status, health.reason) == ("dead", "the engine stopped: ValueError: broken")
    assert health.last_cause == "ValueError: broken"


def test_a_front_that_cannot_go_on_is_dead_too(front, client, monkeypatch):
    monkeypatch.setattr(front._outputs, "process", lambda step: 1 / 0)
    submit(front)
    client.step()
    assert "could not be processed: ZeroDivisionError" in str(front.death.result(0))
    assert front.health().status == "dead"


def test_a_silent_engine_is_degraded(front, client):
    def silence(timeout):
        raise EngineSilentError("the engine loop did not answer within 5 s")

    client.health = silence
    assert (front.health().status, front.health().reason) == (
        "degraded",
        "the engine loop did not answer within 5 s",
    )


def test_shutdown_is_no_death(client):
    front = Front(fake_assembly(client))
    front.shutdown()
    assert not front.death.done()


def test_plugins_and_observers_hear_of_requests_that_died(client):
    class Plugin:
        ends: ClassVar[list] = []

        @hookimpl
        def on_request_finished(self, summary):
            self.ends.append((summary.request_id, summary.finish_reason, summary.error_code))

    class Watcher(Observer):
        steps: ClassVar[list] = []

        def on_step(self, step, done):
            self.steps.append((step.request_ids, [end.request_id for end in done.summaries]))

    plugin, observer = Plugin(), Watcher()
    front = Front(fake_assembly(client, subscribers=(plugin,)))
    front.observe(observer)
    submit(front, "a")
    client.replace()
    assert plugin.ends == [("a", "error", "engine_dead")] and observer.steps == [([], ["a"])]
    front.shutdown()


def test_the_cause_is_in_the_log_with_its_traceback(front, client, caplog):
    try:
        raise KeyError("page 7")
    except KeyError as error:
        client.die(error)
    assert "the engine died: the engine stopped: KeyError" in caplog.text
    assert 'raise KeyError("page 7")' in caplog.text


async def test_waiting_for_the_death_can_be_given_up():
    client = Restartable()
    async with AsyncLLM.from_front(Front(fake_assembly(client))) as llm:
        first, second = asyncio.ensure_future(llm.wait_dead()), asyncio.ensure_future(llm.wait_dead())
        await asyncio.sleep(0)
        first.cancel()
        threading.Thread(target=client.die, args=(ValueError("broken"),)).start()
        assert isinstance(await asyncio.wait_for(second, 10), EngineDeadError)
        assert first.cancelled()


# ── Counters ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_queue_is_counted_as_it_comes_and_goes(front, client):
    submit(front, "a")
    submit(front, "b", n=3)
    assert (front.num_active, front.num_waiting) == (4, 4)
    client.step()
    assert (front.num_active, front.num_waiting) == (4, 0)
    submit(front, "c")
    front.abort([front.find("c")])
    assert (front.num_active, front.num_waiting) == (5, 1)  # until the engine has said so
    client.step()
    assert (front.num_active, front.num_waiting) == (4, 0)
    submit(front, "d")
    client.replace()
    assert (front.num_active, front.num_waiting) == (0, 0)


def test_what_the_engine_refuses_is_not_counted(front, client):
    client.die(ValueError("broken"))
    with pytest.raises(EngineDeadError):
        submit(front)
    assert (front.num_active, front.num_waiting) == (0, 0)
